"""A real single-node Kafka broker for tests and trials: jars by Maven, KRaft, one process."""
