"""Seconds per GRPO step: stdist's stage against TRL's GRPOTrainer.

A step is all of it: sample G candidates for every cell of one window, reward them, score them under the frozen
reference, take the gradient, update. Both sides hold the same weights and a LoRA of the same shape, read the same
prompts, write K tokens a candidate and are rewarded by the same function. They run in turn, in one process, on one
core. The peer gets the fastest of several batch sizes, found before the clock runs. ``_trl_peer.py`` says what else
favours it.

    pip install -c constraints.txt -e ".[dev]"
    python benchmarks/grpo_step.py --json
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import logging
import secrets
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _harness import Cost, comparison, figure, parser, peak_bytes, publish, reset_peak, seconds
from _trl_peer import TRL_VERSION, Batches, Peer, Samples, check_same_model

import stdist.vision_llm.rollout.rollouts
from data_prep import READERS
from stdist.config.base import WorkersConfig
from stdist.data import open_store
from stdist.runs.workers import WorkPool
from stdist.training.engine import TorchEngine, cosine_schedule
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import GRPOConfig
from stdist.vision_llm.learning import parameter_groups
from stdist.vision_llm.policy.adapters import begin_grpo
from stdist.vision_llm.policy.checkpoints import build_policy
from stdist.vision_llm.policy.city_windows import CityWindows
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.policy.spec import PolicySpec, Setting
from stdist.vision_llm.rollout.pool import PoolRollouts, RolloutProgram
from stdist.vision_llm.stages.grpo import GRPOStage

PRESET, GROUP = "tiny", 8
# Text tokens stand for the visual tokens of the frames and their two delimiters, so that no side runs the vision tower:
# the peer would run it for every sample, stdist once a window.
FRAMES, TOKENS_PER_FRAME = 12, 16 + 2
# More sequences in one backward pass of the peer take gigabytes; long before, it gets no faster.
LARGEST_UPDATE = 128
# Candidates of a run may go past K so that the reward can tell them off; here both sides write K tokens.
stdist.vision_llm.rollout.rollouts.EXTRA_TOKENS = 0


class Task:
    """The one training window of a synthetic city of ``side`` × ``side`` cells, and equal policies that read it."""

    def __init__(self, side: int, horizon: int, store_path: Path):
        self.side = side
        days = (FRAMES + horizon) // 24  # of each part of the split: one window fits
        first = [np.datetime64("2013-11-01") + part * days for part in range(3)]
        spans = [f"{day}:{day + days - 1}" for day in first]
        split = dict(zip(("train", "validation", "test"), spans, strict=True))
        READERS["synthetic"].prepare([], store_path, height=side, width=side, days=3 * days, cadence=60, **split)
        self._windows = open_store(store_path).windows("train", FRAMES, horizon, channel="internet")
        self._setting = Setting(city="synthetic", channel="internet", cadence=60, history=FRAMES, horizon=horizon)
        self.cell_mean = self._windows.read(np.array([0])).history[0].mean(0).ravel()

    def policy(self) -> PolicyModel:
        policy = build_policy(
            PolicySpec(base=PRESET, mantissa_digits=2, setting=self._setting, base_is_trained=True), 0
        )
        instruction, digits = policy.prompts.shared, policy.prompts.text_ids("0123456789")
        frames = [digits[i % 10] for i in range(FRAMES * TOKENS_PER_FRAME)]
        policy.prompts.shared = lambda origin: frames + instruction(origin)
        return policy

    def city(self, policy: PolicyModel) -> CityWindows:
        return CityWindows(policy, self._windows, clamp=True)

    def samples(self) -> Samples:
        """What the stage draws every time: this window, all cells."""
        city = self.city(self.policy())
        batch = city.batch(np.array([0]), city.cells)
        prompts = torch.cat([batch.shared.expand(len(batch.prompts), -1), batch.prompts], dim=1)
        return Samples(prompts.tolist(), batch.truth[0], self.cell_mean)


class Ours:
    """The stage and the engine of a run."""

    def __init__(self, task: Task, config: GRPOConfig, folder: Path | None):
        """``folder``: where a pool's ledger is; None: the stage samples itself."""
        self.policy = task.policy()
        begin_grpo(self.policy)
        city = task.city(self.policy)
        rollouts = None
        if folder is not None:
            rollouts = PoolRollouts(self.policy, config, 0, pool_of(task, config, folder), ProcessGroup())
        self._stage = GRPOStage(
            self.policy, city, city, task.cell_mean, config, seed=0, decoding="median", rollouts=rollouts
        )
        schedule = cosine_schedule(config.warmup_steps, config.max_steps)
        self._engine = TorchEngine(parameter_groups(self.policy, config), schedule, config.max_grad_norm)
        self.tokens_per_candidate: list[float] = []

    def step(self) -> float:
        """Seconds of one step."""

        def work() -> None:
            number = len(self.tokens_per_candidate)
            self._stage.on_weights_changed(number)
            details = self._stage.step(number, self._engine.backward)
            self._engine.step()
            self.tokens_per_candidate.append(details["tokens_per_candidate"])

        return seconds(work)


def pool_of(task: Task, config: GRPOConfig, folder: Path) -> WorkPool:
    """One worker in a process of its own, on the machine's other core."""
    import ray

    from stdist.orchestration.policy_workers.coordinator import Coordinator, RemotePool

    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)

    def program() -> RolloutProgram:
        stdist.vision_llm.rollout.rollouts.EXTRA_TOKENS = 0
        policy = task.policy().eval()
        begin_grpo(policy)
        return RolloutProgram(policy, config, 0)

    settings = WorkersConfig(num_workers=1)
    return RemotePool(Coordinator.remote(program, settings, {"CPU": 1}, folder / "ledger.jsonl"), settings.timeout)


class TokenCount:
    """Tokens that a decoder computes, by what for. Counted where its first layer's feed-forward part is called."""

    def __init__(self, model: transformers.Qwen2_5_VLForConditionalGeneration):
        self._tokens: Counter[str] = Counter()
        self._layer = model.model.language_model.layers[0]
        self._layer.mlp.register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        # On both sides the reference is the model with its adapter off.
        if self._layer.self_attn.q_proj.disable_adapters:
            phase = "reference"
        else:
            phase = "update" if torch.is_grad_enabled() else "sampling"
        self._tokens[phase] += inputs[0].shape[:-1].numel()

    def per_step(self, steps: int) -> dict[str, int]:
        phases = {phase: round(self._tokens[phase] / steps) for phase in ("sampling", "reference", "update")}
        return phases | {"all": sum(phases.values())}


class Turns:
    """Called after each step of the peer, with its seconds: takes a step of ours and notes what both cost."""

    def __init__(self, ours: Ours):
        self._ours = ours
        self.ours: list[Cost] = []
        self.peer: list[Cost] = []
        self._resident = reset_peak()

    def __call__(self, peer_seconds: float) -> None:
        self.peer.append(Cost(None, peer_seconds, peak_bytes() - self._resident))
        before = reset_peak()
        self.ours.append(Cost(None, self._ours.step(), peak_bytes() - before))
        self._resident = reset_peak()


def fastest_batches(task: Task, samples: Samples, config: GRPOConfig, folder: Path) -> dict[Batches, float]:
    """Seconds of the peer's faster warm step of two, by batch size; an optimizer step has the same samples at all."""
    group, side, everything = config.num_generations, task.side, len(samples.prompts) * config.num_generations
    tried: dict[Batches, float] = {}

    def attempt(batches: Batches) -> None:
        steps: list[float] = []
        Peer(task.policy(), samples, config, batches, folder).train(3, steps.append)
        tried[batches] = min(steps[1:])

    for update in (group, group * side, everything):
        if update <= LARGEST_UPDATE:
            attempt(Batches(update, everything))
    best = min(tried, key=tried.__getitem__)
    attempt(Batches(best.update, max(best.update, group * side)))
    return tried


def measure(side: int, horizon: int, runs: int, workers: bool) -> dict[str, Any]:
    config = GRPOConfig(windows_per_step=1, cells_per_window=side * side, num_generations=GROUP)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = Task(side, horizon, folder / "city.zarr")
        samples = task.samples()
        check_same_model(task.policy(), samples)
        tried = fastest_batches(task, samples, config, folder)
        batches = min(tried, key=tried.__getitem__)
        ours, peer = (
            Ours(task, config, folder if workers else None),
            Peer(task.policy(), samples, config, batches, folder),
        )
        counts = TokenCount(ours.policy.base_model), TokenCount(peer.model)
        turns = Turns(ours)
        peer.train(1 + runs, turns)
    # The first step of each side warms up.
    ours_costs, peer_costs = turns.ours[1:], turns.peer[1:]
    tokens, peer_tokens = (count.per_step(1 + runs) for count in counts)
    return comparison(
        "grpo_step_workers" if workers else "grpo_step",
        "seconds per GRPO step",
        [cost.seconds for cost in ours_costs],
        f"GRPOTrainer of trl {TRL_VERSION}, {batches}",
        [cost.seconds for cost in peer_costs],
        f"preset {PRESET}, 2 mantissa digits, LoRA of rank {ours.policy.spec.lora_r}, 1 window x {side * side} cells, "
        f"G {GROUP}, S {FRAMES}, K {horizon}, prompts of {len(samples.prompts[0])} tokens, of which "
        f"{FRAMES * TOKENS_PER_FRAME} text tokens stand for the frames; the peer's numeral rows are frozen; float32, "
        f"torch {torch.__version__}, transformers {transformers.__version__}",
        better="less",
        decoder_tokens_per_step={
            "value": tokens,
            "peer_value": peer_tokens,
            "ratio": figure(peer_tokens["all"] / tokens["all"]),
        },
        tokens_per_candidate={
            "value": figure(statistics.mean(ours.tokens_per_candidate)),
            "peer_value": figure(statistics.mean(peer.tokens_per_candidate)),
        },
        peak_mib_of_a_step={
            "value": figure(statistics.median(cost.peak_bytes for cost in ours_costs) / 2**20),
            "peer_value": figure(statistics.median(cost.peak_bytes for cost in peer_costs) / 2**20),
        },
        peer_seconds_by_batches={str(key): figure(value) for key, value in tried.items()},
    )


def main() -> None:
    arguments = parser(__doc__, runs=7)
    arguments.add_argument("--side", type=int, default=5, help="cells along a side of the city (default: %(default)s)")
    arguments.add_argument("--horizon", type=int, choices=(12, 36), default=12, help="K (default: %(default)s)")
    arguments.add_argument("--workers", action="store_true", help="sample in a worker's process, through the pool")
    chosen = arguments.parse_args()
    publish(measure(chosen.side, chosen.horizon, chosen.runs, chosen.workers), chosen.json)


if __name__ == "__main__":
    main()
