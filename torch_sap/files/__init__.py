"""Weights in files: sparse models, checkpoints of other programs, atomic writing."""
