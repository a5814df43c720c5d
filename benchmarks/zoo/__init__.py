"""Prune every architecture of timm."""
