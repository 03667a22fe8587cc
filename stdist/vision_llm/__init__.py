"""ST-Vision-LLM, in the paper's order: frames, prompts, numeral rows, policy, sampler, reward, and the four stages."""

from stdist.vision_llm.policy import Policy
from stdist.vision_llm.reward import reward

__all__ = ["Policy", "reward"]
