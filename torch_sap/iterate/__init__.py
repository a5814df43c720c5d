"""Algorithm 1, one round at a time."""
