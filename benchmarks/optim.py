"""Learning curve of AdamW with moments of eight bits against moments in float32.

The alignment stage of ST-Vision-LLM on the preset ``tiny``, trained in full: its numeral rows begin from the same
weights and learn from the same examples in the same order; only the optimizer differs. The value is the mean loss of
the last tenth of the steps.

    python benchmarks/optim.py --json
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

from statistics import fmean
from typing import Any

import torch
from _harness import comparison, figure, parser, publish

from stdist.training.eight_bit_engine import EightBitEngine
from stdist.training.engine import TorchEngine, cosine_schedule
from stdist.vision_llm.config import AlignmentConfig
from stdist.vision_llm.learning import begin_stage, parameter_groups
from stdist.vision_llm.policy.checkpoints import build_policy
from stdist.vision_llm.policy.spec import PolicySpec, Setting
from stdist.vision_llm.stages.alignment import AlignmentStage

SETTINGS = AlignmentConfig(
    trainable="full", learning_rate=3e-3, warmup_steps=20, weight_decay=0.01, train_batch_size=32, values_per_example=1
)


def train(engine_class: type[TorchEngine], steps: int, digits: int, seed: int) -> tuple[list[float], int]:
    """Losses of every step, and the bytes that the optimizer holds."""
    setting = Setting(city="", channel="", cadence=10, history=4, horizon=3)
    spec = PolicySpec(base="tiny", dtype="float32", setting=setting, mantissa_digits=digits, base_is_trained=True)
    policy = build_policy(spec, seed)
    begin_stage(policy, "alignment", "full", seed)
    stage = AlignmentStage("alignment", policy, SETTINGS, seed)
    schedule = cosine_schedule(SETTINGS.warmup_steps, steps)
    engine = engine_class(parameter_groups(policy, SETTINGS), schedule, SETTINGS.max_grad_norm)
    losses = []
    for step in range(steps):
        losses.append(stage.step(step, engine.backward)["loss"])
        engine.step()
    return losses, sum(tensor.nbytes for _, tensor in engine.state())


def measure(runs: int, steps: int, digits: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    ours, peer, sizes = [], [], (0, 0)
    curves: list[list[float]] = []
    for seed in range(runs):
        (eight_bit, small), (exact, large) = (
            train(kind, steps, digits, seed) for kind in (EightBitEngine, TorchEngine)
        )
        last = max(1, steps // 10)
        ours.append(fmean(eight_bit[-last:]))
        peer.append(fmean(exact[-last:]))
        curves, sizes = [eight_bit, exact], (small, large)
    every = max(1, steps // 10)
    return comparison(
        name="optim",
        unit="loss, mean of the last tenth of the steps",
        values=ours,
        peer="AdamW with moments in float32",
        peer_values=peer,
        setting=f"alignment of the preset tiny in full, numerals of {digits} digits, {steps} steps of 32 examples, "
        f"torch {torch.__version__}",
        better="less",
        differences=[figure(a / b - 1) for a, b in zip(ours, peer, strict=True)],
        optimizer_bytes=sizes[0],
        peer_optimizer_bytes=sizes[1],
        times_fewer_optimizer_bytes=figure(sizes[1] / sizes[0]),
        curve=[figure(fmean(curves[0][i : i + every])) for i in range(0, steps, every)],
        peer_curve=[figure(fmean(curves[1][i : i + every])) for i in range(0, steps, every)],
    )


def main() -> None:
    arguments = parser(__doc__, runs=3)
    arguments.add_argument("--steps", type=int, default=300)
    arguments.add_argument("--digits", type=int, default=2, help="of the numerals' mantissas")
    given = arguments.parse_args()
    publish(measure(given.runs, given.steps, given.digits), given.json)


if __name__ == "__main__":
    main()
