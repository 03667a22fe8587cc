"""The seam between a learner and whatever samples for it: weights go in, candidates come out, by step, window and cell.

Candidates are plain records on the CPU that name the weights which wrote them. A draw depends on seed, step, window,
cell and candidate alone: whoever samples any part of a step, once or again, writes the same.
"""

import hashlib
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stdist.data.sampler import uniform
from stdist.training.checkpoint import checksums
from stdist.training.inference import inference
from stdist.vision_llm.config import Drawing, GRPOConfig
from stdist.vision_llm.policy.city_windows import PolicyBatch
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.rollout.sampler import Completions, Sampler

# A candidate may run past K so that the length term of Eq. 17 can tell it off; it is cut this far behind.
EXTRA_TOKENS = 4


@dataclass(frozen=True)
class Weights:
    """The trained tensors of a policy, by the names of ``PolicyModel.state_dict``: adapter and numeral rows."""

    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, policy: PolicyModel) -> "Weights":
        """The policy's own tensors: they change with it, and are copied by whoever sends them elsewhere."""
        return cls({name: p.detach() for name, p in policy.named_parameters() if p.requires_grad})

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and sums of bits, taken when it is first asked for.

        The sums are made where the tensors are: the numerals' rows of a 7B are 5.7 GB, which no step can hash.
        """
        sums = checksums(self.tensors)
        lines = [f"{name} {x.dtype} {list(x.shape)} {sums[name]}" for name, x in sorted(self.tensors.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Candidates:
    """The G candidates of one cell of one window.

    Attributes:
        step: of the stage. window: index of its last history frame on the store's time axis. cell: number in the
            region of the windows.
        weights: digest of the weights that wrote them.
        answer_ids: numerals, then the end where there was room; behind it more ends. K numerals if drawn in one pass.
        log_probs: of each token at the sampling temperature, 0 behind the end.
        lengths: numerals written.
    """

    step: int
    window: int
    cell: int
    weights: str
    answer_ids: Int[np.ndarray, "G tokens"]
    log_probs: Float[np.ndarray, "G tokens"]
    lengths: Int[np.ndarray, " G"]


class Rollouts(Protocol):
    """Samples candidates with the weights it was given.

    Attributes:
        versions: weights that may write, by the names that candidates carry, with the updates they had seen.
        max_staleness: rollouts that may be asked for before the weights that learn from them are there.
        metrics: of the last ``generate``, for the log.
    """

    versions: dict[str, int]
    max_staleness: int
    metrics: dict[str, float]

    def update_weights(self, step: int, weights: Weights) -> None:
        """The weights after ``step`` updates write what is requested from now on; what was generated before has been
        learnt from."""
        ...

    def request(self, step: int, batch: PolicyBatch) -> None:
        """Lets the candidates of a step begin; ``generate`` is called for it in its turn."""
        ...

    def generate(self, step: int, batch: PolicyBatch) -> list[Candidates]:
        """The candidates of every window and cell of ``batch``, in any order."""
        ...

    def close(self) -> None:
        """The training has ended; nothing more will be learnt from."""
        ...


class LocalRollouts:
    """Samples in the learner's own process, with the policy that it trains."""

    max_staleness = 0

    def __init__(self, policy: PolicyModel, config: GRPOConfig, seed: int):
        self.policy, self.seed, self.num_generations = policy, seed, config.num_generations
        self._candidates = config.candidates
        self._sampler = Sampler(
            policy, "sample", config.num_generations, config.temperature, config.top_p, config.candidates == "chain"
        )
        self.versions: dict[str, int] = {}
        self.metrics: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    def update_weights(self, step: int, weights: Weights) -> None:
        self.versions = {weights.digest: step}

    def request(self, step: int, batch: PolicyBatch) -> None:
        """Nothing: this process samples when it is asked, or it does not train."""

    def close(self) -> None:
        """Nothing is in flight."""

    def release(self) -> None:
        """Gives the memory back that is kept for more samples."""
        self._sampler.release()

    def generate(self, step: int, batch: PolicyBatch) -> list[Candidates]:
        (name,) = self.versions
        candidates = self.sample(step, batch, name)
        self.release()  # this process trains now
        self.metrics = {f"seconds/{phase}": spent for phase, spent in self.seconds.items()}
        return candidates

    def sample(self, step: int, batch: PolicyBatch, weights: str) -> list[Candidates]:
        """Candidates that say ``weights`` wrote them. Leaves the ``seconds`` of both phases: of the windows' prefixes
        (prefill), and of their cells' prompts and tokens (decode)."""
        policy, g = self.policy, self.num_generations
        keys = [(window, cell) for window in batch.origins.tolist() for cell in batch.cells.tolist()]
        tokens = max_tokens(policy, self._candidates)
        quantiles = uniforms(((self.seed, step, *key, g_) for key in keys for g_ in range(g)), tokens).to(policy.device)
        began = time.perf_counter()
        with inference(policy):
            prefix = policy.prefix(batch.shared, batch.grids)
        encoded = time.perf_counter()
        if self._candidates == "direct":
            completions = self._sampler.draw(prefix, batch.prompts, quantiles)
        else:
            completions = self._sampler.generate(prefix, batch.prompts, tokens, quantiles)
        answer_ids, log_probs, lengths = (
            x.cpu().numpy().reshape(len(keys), g, *x.shape[1:])
            for x in (completions.answer_ids, completions.log_probs, completions.lengths)
        )
        self.seconds = {"prefill": encoded - began, "decode": time.perf_counter() - encoded}
        return [
            Candidates(step, *key, weights, *arrays)
            for key, *arrays in zip(keys, answer_ids, log_probs, lengths, strict=True)
        ]


def max_tokens(policy: PolicyModel, candidates: Drawing) -> int:
    """The most tokens of a candidate, the end included where it writes one."""
    return policy.spec.setting.horizon + (EXTRA_TOKENS if candidates == "chain" else 0)


def uniforms(keys: Iterable[tuple[int, ...]], count: int) -> Float[Tensor, "keys count"]:
    """Uniform float32 numbers in [0, 1), each row a function of its key alone."""
    # All bits of a float32: rounded up to 1, a number would be no quantile of any distribution.
    return torch.from_numpy(np.stack([np.floor(uniform(count, *key) * 2**24) for key in keys]) * 2.0**-24).float()


def completions_of(
    records: Iterable[Candidates], step: int, batch: PolicyBatch, weights: Collection[str], policy: PolicyModel
) -> Completions:
    """The candidates of a batch in its order, on the policy's device, as wide as the longest.

    Raises RuntimeError where those of a cell are missing, of another step, or of weights that are none of ``weights``.
    """
    by_key = {(record.step, record.window, record.cell): record for record in records}
    ordered = []
    for window in batch.origins.tolist():
        for cell in batch.cells.tolist():
            record = by_key.get((step, window, cell))
            if record is None or record.weights not in weights:
                reason = "none" if record is None else f"some of weights {record.weights[:12]}…"
                names = ", ".join(f"{name[:12]}…" for name in weights)
                raise RuntimeError(
                    f"step {step} needs candidates of window {window}, cell {cell} by weights {names}; "
                    f"there are {reason}"
                )
            ordered.append(record)
    vocabulary = policy.vocabulary
    end, width = len(vocabulary), max(record.answer_ids.shape[1] for record in ordered)

    def joined(arrays: list[np.ndarray], fill: int) -> Tensor:
        padded = [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=fill) for a in arrays]
        return torch.from_numpy(np.concatenate(padded))

    answer_ids = joined([record.answer_ids for record in ordered], end)
    log_probs = joined([record.log_probs for record in ordered], 0)
    lengths = torch.from_numpy(np.concatenate([record.lengths for record in ordered]))
    values = torch.tensor([*vocabulary.values, 0.0], dtype=torch.float32)[answer_ids]
    mask = torch.arange(width) <= lengths[:, None]
    return Completions(*(x.to(policy.device) for x in (answer_ids, mask, log_probs, values, lengths)))
