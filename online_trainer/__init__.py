"""Preference events in, published versions out. The core runs without Ray, Kafka, Redis or MLflow."""
