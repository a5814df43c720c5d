"""Tables and checks of pruned models."""
