"""ST-Vision-LLM in TRL's own trainers: the policy as their model, its prompts as their data set, its reward.

For notebooks (docs/trl.md); a run has ``backend: trl``. Needs the extra ``trl``.
"""

from stdist.vision_llm.learning import require_trl

require_trl()

from stdist.vision_llm.trl.processor import PolicyProcessor  # noqa: E402
from stdist.vision_llm.trl.reward import numeral_reward  # noqa: E402
from stdist.vision_llm.trl.view import TransformersView, grpo_view  # noqa: E402
from stdist.vision_llm.trl.window_dataset import AnswerCollator, window_dataset  # noqa: E402

__all__ = ["AnswerCollator", "PolicyProcessor", "TransformersView", "grpo_view", "numeral_reward", "window_dataset"]
