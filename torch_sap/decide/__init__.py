"""Decide which weights go: tensors in, masks out, without models or process groups."""
