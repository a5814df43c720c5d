"""Which weights go: tensors in, masks out. Knows no model and changes nothing in place."""
