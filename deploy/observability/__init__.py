"""Generated observability: recording rules, alerts, their promtool tests and a Grafana dashboard.

``python -m deploy.observability`` writes the files beside this one; a test compares them with what is committed.
"""
