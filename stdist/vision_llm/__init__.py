"""ST-Vision-LLM, in the paper's order: frames, prompts, numeral rows, policy, sampler, reward, and the four stages."""

import logging
import os

import torch

# peft imports DeepSpeed where it is there, which would tell every user of a CPU that it found no GPU.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# On import, and for a kernel that stdist does not use, bitsandbytes would tell every user to install a package.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from stdist.vision_llm.policy.model import Policy  # noqa: E402
from stdist.vision_llm.stages.reward import reward  # noqa: E402

__all__ = ["Policy", "reward"]
