"""What a pruning found and did, as plain records."""
