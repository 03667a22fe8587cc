"""What the benchmarks of the prefix tree share: one window of a city, the policy, and the same weights as the peer's.

Frames are stood for by as many ordinary text tokens, so that neither side runs the vision tower: the tree would run it
once a window, the peers once a sample. Prompts are the policy's own.
"""

import copy

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from stdist.vision_llm.policy.checkpoints import build_policy
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.spec import PolicySpec, Setting

FRAMES, HORIZON = 12, 36
VISUAL_TOKENS = (16, 64)
ORIGIN = np.datetime64("2013-11-05T09:00")


def make_policy() -> PolicyModel:
    """The decoder of the preset ``small`` with 1,801 numerals."""
    setting = Setting(city="milan", channel="internet", cadence=10, history=FRAMES, horizon=HORIZON)
    spec = PolicySpec(base="small", mantissa_digits=2, setting=setting, base_is_trained=True)
    return build_policy(spec, seed=0)


def make_prompts(policy: PolicyModel, visual_tokens: int, cells: int) -> tuple[Tensor, Tensor]:
    """Ids of the window's shared prompt ``[1, V]`` and of its cells' own ``[cells, T]``."""
    rng = np.random.default_rng(0)
    text = rng.integers(16, policy.first_numeral_id, FRAMES * (visual_tokens + 2)).tolist()
    shared = torch.tensor([text + policy.prompts.shared(ORIGIN)])
    rows, cols = np.divmod(np.arange(cells), round(cells**0.5))
    history = rng.lognormal(4, 1, (cells, FRAMES))
    return shared, torch.from_numpy(policy.prompts.cells(rows, cols, history))


def no_grids() -> Tensor:
    """A window's grids, for a policy that sees none."""
    return torch.zeros(1, FRAMES, 1, 1)


def plain_model(policy: PolicyModel) -> Qwen2_5_VLForConditionalGeneration:
    """The policy's weights as transformers holds them: one embedding and one head, its own SDPA attention."""
    model = copy.deepcopy(policy.base_model)
    first = policy.first_numeral_id
    model.resize_token_embeddings(first + len(policy.vocabulary), mean_resizing=False)
    model.get_input_embeddings().weight.data[first:] = policy.rows.input.data
    model.lm_head.weight.data[first:] = policy.rows.output.data
    model.config.get_text_config()._attn_implementation = "sdpa"
    return model.eval()
