"""Labels: what a model is to say at a position."""

IGNORE = -100
"""The label of a position without a loss."""
