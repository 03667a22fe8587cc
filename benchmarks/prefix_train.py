"""A GRPO update of one window, forward and backward: the prefix tree against one sequence per candidate.

The peer is what a trainer without a tree does with the same adapters, rows and loss: full sequences through the
decoder of transformers with its own SDPA attention, no padding, logits at target positions only, at the batch size that
is fastest. It is timed on a part of the candidates, each of which costs the same. Both sides must agree on the
gradient.

    python benchmarks/prefix_train.py --json
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

from collections.abc import Callable
from typing import Any

import torch
from _decoder_flops import Flops, Window
from _harness import comparison, figure, in_turn, parser, publish, seconds
from _window import HORIZON, VISUAL_TOKENS, make_policy, make_prompts, no_grids
from torch import Tensor
from torch.nn import functional as F

from stdist.vision_llm.config import GRPOConfig
from stdist.vision_llm.policy.adapters import begin_grpo
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.sampler import Completions
from stdist.vision_llm.stages.grpo import candidate_log_probs
from stdist.vision_llm.stages.loss import LossInputs, grpo
from stdist.vision_llm.tree import prefix_tree
from stdist.vision_llm.tree.micro_batches import MicroBatches
from stdist.vision_llm.tree.prefix_tree import Level, Tree

CELLS, CANDIDATES = 121, 8
ACTIVATION_BYTES = 2**30
PEER_BATCHES = (1, 2, 4, 8)
PEER_CANDIDATES = {16: 48, 64: 16}


class Update:
    """The same update both ways, of the first ``cells`` cells of a window."""

    def __init__(self, policy: PolicyModel, visual_tokens: int, cells: int):
        self.policy = policy
        self.shared, self.prompts = make_prompts(policy, visual_tokens, cells)
        generator = torch.Generator().manual_seed(1)
        n = cells * CANDIDATES
        choices = torch.randint(len(policy.vocabulary), (n, HORIZON), generator=generator)
        everything = torch.ones(n, HORIZON, dtype=torch.bool)
        log_probs = torch.full((n, HORIZON), -7.5)
        self.completions = Completions(choices, everything, log_probs, torch.zeros(n, HORIZON), everything.sum(1))
        self.advantages = torch.randn(n, generator=generator)
        read = choices[:, :-1] + policy.first_numeral_id
        self.tree = Tree(self.shared, no_grids(), (Level(self.prompts), Level(read)))
        self.sizes = MicroBatches(policy, ACTIVATION_BYTES).sizes(self.tree)

    def _loss(self, log_probs: Tensor, rows: slice) -> Tensor:
        inputs = LossInputs(
            trainer_log_probs=log_probs,
            rollout_log_probs=self.completions.log_probs[rows],
            reference_log_probs=self.completions.log_probs[rows],
            advantages=self.advantages[rows],
            mask=self.completions.mask[rows],
            tokens=self.completions.mask.numel(),
            sequences=len(self.advantages),
            max_tokens=HORIZON,
        )
        return grpo(inputs, GRPOConfig(epsilon=0.2, beta=0.04))[0]

    def through_the_tree(self) -> None:
        def loss(rows: slice, states: Tensor) -> Tensor:
            return self._loss(candidate_log_probs(self.policy, states, self.completions, rows, 1.0), rows)

        self.policy.zero_grad()
        prefix_tree.backward(self.policy, self.tree, loss, Tensor.backward, self.sizes)

    def per_sample(self, candidates: int, batch_size: int) -> None:
        policy, decoder = self.policy, self.policy.base_model.model.language_model
        previous = self.tree.levels[-1].ids
        prompts = self.prompts.repeat_interleave(CANDIDATES, 0)
        policy.zero_grad()
        for start in range(0, candidates, batch_size):
            rows = slice(start, min(start + batch_size, candidates))
            shared = self.shared.expand(rows.stop - rows.start, -1)
            ids = torch.cat([shared, prompts[rows], previous[rows]], dim=1)
            hidden = decoder(inputs_embeds=policy.embed(ids), use_cache=False).last_hidden_state[:, -HORIZON:]
            logits = F.linear(hidden.flatten(0, 1), torch.cat(policy.answer_head))
            log_probs = -F.cross_entropy(logits, self.completions.answer_ids[rows].flatten(), reduction="none")
            self._loss(log_probs.view(-1, HORIZON), rows).backward()

    def gradient(self, update: Callable[[], None]) -> Tensor:
        update()
        return torch.cat([p.grad.flatten() for p in self.policy.parameters() if p.grad is not None])


def check(policy: PolicyModel) -> None:
    few = Update(policy, 16, cells=2)
    ours, peer = few.gradient(few.through_the_tree), few.gradient(lambda: few.per_sample(len(few.advantages), 4))
    difference = ((ours - peer).norm() / peer.norm()).item()
    if not difference < 1e-4:
        raise SystemExit(f"error: gradients of the two sides differ by {difference:.1e}")


def measure(policy: PolicyModel, visual_tokens: int, runs: int) -> dict[str, Any]:
    update, some = Update(policy, visual_tokens, CELLS), PEER_CANDIDATES[visual_tokens]
    update.per_sample(max(PEER_BATCHES), max(PEER_BATCHES))
    times = {
        size: min(seconds(lambda size=size: update.per_sample(some, size)) for _ in range(2)) for size in PEER_BATCHES
    }
    best = min(times, key=lambda size: times[size])
    ours, peer = in_turn(update.through_the_tree, lambda: update.per_sample(some, best), runs)
    peer = [value * len(update.advantages) / some for value in peer]

    window = Window(update.shared.shape[1], CELLS, update.prompts.shape[1], CANDIDATES, HORIZON)
    flops = Flops(policy.base_model.config.get_text_config(), training=True, lora_r=policy.spec.lora_r)
    predicted, head_rows = window.leaves * HORIZON, len(policy.vocabulary) + 1
    needed = flops.total(window.tree_tokens, window.tree_keys, predicted, head_rows)
    peer_needed = flops.total(window.sample_tokens, window.sample_keys, predicted, head_rows)
    result = comparison(
        name="prefix_train",
        unit="seconds for the update of one window",
        values=ours,
        peer="one sequence per candidate through transformers",
        peer_values=peer,
        setting=(
            f"{CELLS} cells, G = {CANDIDATES}, K = {HORIZON}, 12 frames of {visual_tokens} visual tokens, "
            f"V = {window.shared}, T = {window.prompt}; decoder of the preset small, LoRA r = {policy.spec.lora_r} and "
            f"numeral rows train, {head_rows} choices, float32; micro-batches {update.sizes}; peer timed on {some} of "
            f"{len(update.advantages)} candidates, batch size {best} of {PEER_BATCHES}; torch {torch.__version__}"
        ),
        better="less",
        tokens_computed=update.tree.tokens,
        tokens_saved=update.tree.tokens_per_sample - update.tree.tokens,
        gigaflops_needed=round(needed / 1e9),
        peer_gigaflops_needed=round(peer_needed / 1e9),
        counted_ratio=figure(peer_needed / needed),
    )
    return result | {"share_of_counted_ratio": figure(result["ratio"] / result["counted_ratio"])}


def main() -> None:
    arguments = parser(__doc__, runs=5).parse_args()
    policy = make_policy()
    begin_grpo(policy)
    check(policy)
    few, many = (measure(policy, visual_tokens, arguments.runs) for visual_tokens in VISUAL_TOKENS)
    publish(few | {f"at_{VISUAL_TOKENS[1]}_visual_tokens": many}, arguments.json)


if __name__ == "__main__":
    main()
