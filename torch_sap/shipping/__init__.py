"""After pruning: what remains, what it costs, small files, and smaller models."""
