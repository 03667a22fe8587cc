"""Recorded decoding steps as runs use them: in half precision, with LoRA, over four bits, in either mode, of several
windows, for many windows. Every replay is compared with the step itself over the same memory.

On a CPU the same tests run with a stand-in of the graph, which shows that the tests are right, not that CUDA is.
"""

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stdist.training.inference import inference
from stdist.vision_llm.policy.city_windows import PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout import decode_batch
from stdist.vision_llm.rollout.recorded_step import RECORDINGS
from stdist.vision_llm.rollout.sampler import Completions, Sampler

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MAX_TOKENS = 6
# Hidden states are of order 1: a few of bfloat16's roundings, should a library take another way inside a graph.
TOLERANCE = 4e-2


class Checked:
    """A recording whose replays must be what the recorded function computes."""

    def __init__(self, recording: Any, run: Callable[[], Tensor], replays: Counter[int]):
        self._recording, self._run, self._replays = recording, run, replays

    @property
    def result(self) -> Tensor:
        return self._recording.result

    def replay(self) -> None:
        self._recording.replay()
        replayed = self.result.clone()
        # Writing a token twice changes nothing.
        torch.testing.assert_close(replayed, self._run(), rtol=0, atol=TOLERANCE)
        self._replays[len(replayed)] += 1


@pytest.fixture
def replays(graphs: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Replays so far, by the sequences of their recording; each is checked. ``graphs``: CPUs record too."""
    made: Counter[int] = Counter()
    for kind, record in list(RECORDINGS.items()):
        monkeypatch.setitem(RECORDINGS, kind, lambda run, record=record: Checked(record(run), run, made))
    return made


@pytest.fixture
def make_of_kind(make_policy: Callable[..., PolicyModel], base: Path) -> Callable[[str, str], PolicyModel]:
    """Policies with a LoRA that is not zero, in bfloat16, over a base of 16 or 4 bits."""

    def make(kind: str, device: str) -> PolicyModel:
        changes = {"dtype": "bfloat16", "base": str(base), "base_is_trained": False}
        if kind == "4-bit":
            pytest.importorskip("bitsandbytes")
            changes["load_in_4bit"] = True
        policy = make_policy(**changes).to(device)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        return policy

    return make


def generate(sampler: Sampler, cells: PolicyBatch, max_tokens: int = MAX_TOKENS) -> Completions:
    with inference(sampler.policy):
        prefix = sampler.policy.prefix(cells.shared, cells.grids)
    uniforms = torch.rand(len(cells.prompts), max_tokens, generator=torch.Generator().manual_seed(len(cells.cells)))
    return sampler.generate(prefix, cells.prompts, max_tokens, uniforms.to(cells.prompts.device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["bfloat16", "4-bit"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("windows", [1, 3])
def test_a_replay_is_the_step(
    make_of_kind: Callable[[str, str], PolicyModel],
    make_batch: Callable[..., PolicyBatch],
    monkeypatch: pytest.MonkeyPatch,
    replays: Counter[int],
    device: str,
    kind: str,
    mode: str,
    windows: int,
) -> None:
    """Two batches, the second and smaller one on the recording of the first; two windows of five cells at a time."""
    policy = make_of_kind(kind, device).train(mode == "train")
    monkeypatch.setattr(decode_batch, "MOST_SEQUENCES", 10)
    sampler = Sampler(policy, "sample")
    batches = [make_batch(policy, windows=(0, 9, 31)[:windows], cells=(1, 3, 7, 10, 18)[i:]) for i in range(2)]
    written = [generate(sampler, batch).answer_ids for batch in batches]
    assert [ids.shape for ids in written] == [(windows * cells, MAX_TOKENS) for cells in (5, 4)]
    assert len(written[0].unique()) > MAX_TOKENS
    steps = 2 * (MAX_TOKENS - 1)
    assert replays == ({5: steps} if windows == 1 else {10: 2 * steps})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["bfloat16", "4-bit"])
def test_memory_is_flat_over_many_windows(
    make_of_kind: Callable[[str, str], PolicyModel],
    make_batch: Callable[..., PolicyBatch],
    graphs: Any,
    device: str,
    kind: str,
) -> None:
    """Windows of unlike numbers of cells, in a policy that trains: what the first ones took is enough for all."""
    policy = make_of_kind(kind, device).train()
    sampler = Sampler(policy, "sample")
    count, taken = (200 if device == "cuda" else 12), []
    for window in range(count):
        cells = (1, 3, 7, 10, 18)[: 5 - window % 3]
        generate(sampler, make_batch(policy, windows=(window % 60,), cells=cells), max_tokens=3)
        taken.append(held(device))
    assert max(taken[5:]) <= taken[5]
    before = held(device)
    sampler.release()
    assert held(device) < before, "the recording goes with its sampler"


def held(device: str) -> int:
    """Bytes of living tensors."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects() if is_tensor(x)}
    return sum(storages.values())


def is_tensor(value: object) -> bool:
    """By its type: other objects answer to isinstance with code of their own."""
    return issubclass(type(value), Tensor)
