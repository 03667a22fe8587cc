"""Training without a model: one engine interface, the loop around it, checkpoints, logs."""
