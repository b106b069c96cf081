"""Checkpoints of other libraries, in both directions."""
