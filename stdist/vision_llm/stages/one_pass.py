"""Candidates drawn in one pass, read again: the G of a cell share its K states behind blanks.

A window's prefix tree has one level, as in fine-tuning: a cell's prompt and K − 1 blanks are one child, whatever its
candidates drew. They differ in the tokens whose log-probabilities are taken from these states, over numerals alone: no
candidate ends early.
"""

from jaxtyping import Float
from torch import Tensor

from stdist.vision_llm.kernels.token_losses import shared_log_probs
from stdist.vision_llm.policy.city_windows import PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.sampler import Completions, one_pass_ids
from stdist.vision_llm.tree.prefix_tree import Level, Tree


def tree(policy: PolicyModel, batch: PolicyBatch, completions: Completions) -> Tree:
    """Windows, and below them each cell's prompt and blanks."""
    return Tree(batch.shared, batch.grids, (Level(one_pass_ids(policy, batch.prompts)),))


def log_probs(
    policy: PolicyModel,
    states: Float[Tensor, "cells tokens d"],
    completions: Completions,
    rows: slice,
    temperature: float,
) -> Float[Tensor, "candidates K"]:
    """Log-probability of the tokens of candidates ``rows`` under the distributions they were drawn from (without
    top-p's cut). ``states`` are those of their cells, complete groups; the last K predict the steps."""
    answer_ids = completions.answer_ids[rows]
    horizon, cells = answer_ids.shape[1], len(states)
    of_steps = answer_ids.view(cells, -1, horizon).transpose(1, 2).flatten(0, 1)
    shared = shared_log_probs(states[:, -horizon:].flatten(0, 1), policy.answer_head[0], of_steps, temperature)
    return shared.view(cells, horizon, -1).transpose(1, 2).flatten(0, 1)
