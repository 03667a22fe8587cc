"""The policy: Qwen2.5-VL with numeral rows and LoRA, what it reads, and its files."""

import logging
import os

import torch

# peft imports DeepSpeed where it is there, which would tell every user of a CPU that it found no GPU.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# On import, and for a kernel that stdist does not use, bitsandbytes would tell every user to install a package.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
