"""Which weights go: from magnitudes to the PQ Index, the count and exact masks. Tensors are read, none is changed."""
