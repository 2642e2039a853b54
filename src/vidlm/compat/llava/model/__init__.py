"""Loading as the research code does it."""
