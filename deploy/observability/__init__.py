"""Generated dashboards, recording rules, alerts and their tests."""
