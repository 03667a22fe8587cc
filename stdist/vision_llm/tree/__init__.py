"""The training pass over a prefix tree, and how large its micro-batches are."""
