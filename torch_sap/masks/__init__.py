"""Pruned modules: which tensors of a model have masks, and what keeps their zeros."""
