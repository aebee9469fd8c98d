"""The front door: who answers, who is compared, what was preferred. OpenAI-compatible HTTP in, events out."""
