"""Checks and tables of a pruned model."""
