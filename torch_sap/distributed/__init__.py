"""Tensors and models that several processes hold together."""
