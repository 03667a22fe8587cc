"""The policy: Qwen2.5-VL with numeral rows and LoRA, what it reads, and its files."""
