"""Writing K numerals for the cells of a window: the sampler over shared prompts against transformers' ``generate``.

``generate`` gets full prompts without padding, at the batch size that is fastest; a processor of its own lets it say
numerals only, as the sampler does. It is timed on a part of the cells, of which each costs the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from _decoder_flops import Flops, Window
from _harness import comparison, figure, in_turn, seconds
from _window import HORIZON, make_prompts, no_grids, plain_model
from torch import Tensor

from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.sampler import Sampler


class Generation:
    """The same forecasts both ways: ``candidates`` samples a cell, or where that is 1 the greedy one."""

    def __init__(self, policy: PolicyModel, visual_tokens: int, cells: int, candidates: int):
        self.policy, self.candidates = policy, candidates
        self.shared, self.prompts = make_prompts(policy, visual_tokens, cells)
        self.model = plain_model(policy)
        self._sampler = Sampler(policy, "greedy" if candidates == 1 else "sample", candidates)

    @torch.no_grad()
    def over_shared_prompts(self) -> Tensor:
        """Ids written, ``[cells · candidates, K]``."""
        prefix = self.policy.prefix(self.shared, no_grids())
        uniforms = None
        if self.candidates > 1:
            shape = len(self.prompts) * self.candidates, HORIZON
            uniforms = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        completions = self._sampler.generate(prefix, self.prompts, HORIZON, uniforms)
        return completions.answer_ids + self.policy.first_numeral_id

    @torch.no_grad()
    def through_generate(self, cells: int, batch_size: int) -> Tensor:
        sampling = {"do_sample": True, "top_k": 0, "num_return_sequences": self.candidates}
        written = []
        for prompts in self.prompts[:cells].split(batch_size):
            ids = torch.cat([self.shared.expand(len(prompts), -1), prompts], dim=1)
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=HORIZON,
                min_new_tokens=HORIZON,
                suppress_tokens=list(range(self.policy.first_numeral_id)),
                eos_token_id=self.policy.end_id,
                pad_token_id=0,
                **(sampling if self.candidates > 1 else {}),
            )
            written.append(output[:, ids.shape[1] :])
        return torch.cat(written)


def check(policy: PolicyModel) -> None:
    """Both sides write the same greedy tokens."""
    few = Generation(policy, 16, cells=6, candidates=1)
    if not torch.equal(few.over_shared_prompts(), few.through_generate(6, 3)):
        raise SystemExit("error: the two sides write different tokens")


def measure(
    name: str,
    policy: PolicyModel,
    visual_tokens: int,
    cells: int,
    candidates: int,
    peer_cells: int,
    peer_batches: tuple[int, ...],
    runs: int,
) -> dict[str, Any]:
    work = Generation(policy, visual_tokens, cells, candidates)

    def peer_at(size: int) -> Callable[[], Tensor]:
        return lambda: work.through_generate(max(peer_cells, size), size)

    peer_at(peer_batches[0])()
    times = {size: min(seconds(peer_at(size)) for _ in range(2)) / max(peer_cells, size) for size in peer_batches}
    best = min(times, key=lambda size: times[size])
    ours, peer = in_turn(work.over_shared_prompts, peer_at(best), runs)
    timed = max(peer_cells, best)
    peer = [value * cells / timed for value in peer]

    window = Window(work.shared.shape[1], cells, work.prompts.shape[1], candidates, HORIZON)
    flops = Flops(policy.base_model.config.get_text_config(), training=False)
    predicted, numerals = window.leaves * HORIZON, len(policy.vocabulary)
    needed = flops.total(window.tree_tokens, window.tree_keys, predicted, numerals + 1)
    peer_rows = work.model.lm_head.weight.shape[0]
    peer_needed = flops.total(window.sample_tokens, window.sample_keys, predicted, peer_rows)
    kind = "greedy" if candidates == 1 else f"{candidates} samples a cell"
    result = comparison(
        name=name,
        unit="seconds for one window",
        values=ours,
        peer="transformers generate",
        peer_values=peer,
        setting=(
            f"{cells} cells, {kind}, K = {HORIZON}, 12 frames of {visual_tokens} visual tokens, V = {window.shared}, "
            f"T = {window.prompt}; decoder of the preset small, {numerals} numerals, float32; peer timed on {timed} of "
            f"{cells} cells, {best} of {peer_batches} cells a batch; torch {torch.__version__}"
        ),
        better="less",
        tokens_computed=window.tree_tokens,
        tokens_saved=window.sample_tokens - window.tree_tokens,
        gigaflops_needed=round(needed / 1e9),
        peer_gigaflops_needed=round(peer_needed / 1e9),
        counted_ratio=figure(peer_needed / needed),
    )
    return result | {"share_of_counted_ratio": figure(result["ratio"] / result["counted_ratio"])}
