"""Masks in a model, in PyTorch's form: where they are, what keeps their zeros in training, and how that is checked."""
