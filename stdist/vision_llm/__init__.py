"""ST-Vision-LLM, in rooms that stand on one another: kernels, policy, tree, rollout, stages; then the recipe."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stdist.vision_llm.notebook import Policy
    from stdist.vision_llm.stages.reward import reward

__all__ = ["Policy", "reward"]


def __getattr__(name: str) -> Any:
    """Imports ``Policy`` and ``reward`` when they are asked for: a configuration is read without transformers."""
    if name == "Policy":
        from stdist.vision_llm.notebook import Policy

        return Policy
    if name == "reward":
        from stdist.vision_llm.stages.reward import reward

        return reward
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
