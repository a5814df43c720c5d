"""Iterative pruning, round by round: measure, prune, rewind, record, stop, and go on after a kill."""
