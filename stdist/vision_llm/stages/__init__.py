"""The four stages of the paper, in order: alignment, arithmetic, SFT, GRPO."""
