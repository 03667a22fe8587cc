"""Attention over shared keys and values, and losses over a large vocabulary: no model, no data."""
