"""The demo: a world of moving shapes, questions about it, and the small model trained on it."""
