"""Whether GRPO lowers the error: on the real 5 x 5 block of Milan, from one fine-tuned checkpoint a seed, candidates
written step by step or in one pass, rewarded by Eq. 17, their squared error or that of their mean, and what advantages
know of squared errors.

A seed is fine-tuned once (``stages: [sft]``, no alignment, ``--sft-steps``); every variant begins with that checkpoint
and makes its steps to the end, without early stopping, so that the last weights are scored and not the luckiest ones.
Errors are NRMSE pooled over observed points of evenly spaced windows, the same ones before and after: ``--windows`` of
the validation and of the test days for the forecast in one pass, ``--few-windows`` for decodings step by step. What is
done is kept below --work, so that a benchmark that was broken off goes on. The data is public and not part of the
project: --data, or STDIST_TEST_DATA, is its folder.

The result's ratio is the SFT checkpoint's test NRMSE over that of ``--headline``, both in one pass, by seeds' medians.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import yaml
from _harness import comparison, parser, publish

from data_prep import READERS
from stdist.evaluation import ErrorState
from stdist.training.loop import Trainer
from stdist.vision_llm.config import VisionLLMConfig
from stdist.vision_llm.policy.checkpoints import load_weights
from stdist.vision_llm.policy.city_windows import CityWindows
from stdist.vision_llm.policy.model import PolicyModel
from stdist.vision_llm.recipe import VisionLLMRecipe
from stdist.vision_llm.rollout.forecaster import forecast_pieces, plan_pieces
from stdist.vision_llm.rollout.rollouts import LocalRollouts, completions_of
from stdist.vision_llm.rollout.sampler import Decoding
from stdist.vision_llm.run import VisionLLMRun
from stdist.vision_llm.stages.grpo import GRPOStage
from stdist.vision_llm.stages.reward import group_advantages

CONFIG = Path(__file__).parent.parent / "configs" / "milan_block.yaml"
COMMON: dict[str, Any] = {
    **{"learning_rate": 3e-4, "numeral_learning_rate": 3e-5, "warmup_steps": 3, "windows_per_step": 2},
    **{"cells_per_window": 25, "half_score": 0.5, "eval_windows": 24, "patience": 1000, "logging_steps": 1},
}
CHAIN = {"candidates": "chain", "max_steps": 40}
DIRECT = {"candidates": "direct", "max_steps": 80}
MANY: dict[str, Any] = DIRECT | {"num_generations": 32}
SQUARED = {"reward": "squared_error"}
# A numeral from far up the scale is nearly all that squared errors tell of a step where one is drawn.
CUT = {"top_p": 0.99}
FREE = {"beta": 0.0}
# Where one is drawn all the same, it does not fill Adam's second moments.
CLIPPED = {"max_grad_norm": 0.02}
FAST = {"learning_rate": 1e-3, "numeral_learning_rate": 1e-4}
# Each step is judged by what it does to the mean of the draws, with so little noise that more steps can be smaller.
OF_MEAN: dict[str, Any] = {"reward": "error_of_mean", "windows_per_step": 4, "max_steps": 152}
OF_MEAN |= {"learning_rate": 1e-4, "numeral_learning_rate": 1e-5}
ALONE = "direct, squared, G 32, top-p, beta 0"
HEADLINE = "direct, error of mean, G 32, top-p, beta 0"
VARIANTS: dict[str, dict[str, Any]] = {
    HEADLINE: MANY | CUT | FREE | OF_MEAN,
    f"{HEADLINE}, 4 updates": MANY | CUT | FREE | OF_MEAN | {"num_iterations": 4},
    "chain, eq17": CHAIN,
    "chain, eq17, 4 updates": CHAIN | {"num_iterations": 4},
    "chain, squared, top-p": CHAIN | SQUARED | CUT,
    "direct, eq17": DIRECT,
    "direct, eq17, G 32": MANY,
    ALONE: MANY | SQUARED | CUT | FREE,
    f"{ALONE}, clipped": MANY | SQUARED | CUT | FREE | CLIPPED,
    f"{ALONE}, clipped, rate 1e-3": MANY | SQUARED | CUT | FREE | CLIPPED | FAST,
    "direct, squared, G 32, scaled, beta 0": MANY | SQUARED | FREE | {"scale_rewards": "group"},
}
SLOW: tuple[tuple[str, Decoding, int], ...] = (
    ("greedy", "greedy", 1),
    ("median", "median", 1),
    ("mean of 8", "sample", 8),
)
SIGNAL_BATCHES, MOST_GAINED = 4, 3
Scores = dict[str, dict[str, float]]


def open_run(work: Path, name: str, seed: int, sft_steps: int, grpo: dict[str, Any] | None) -> VisionLLMRun:
    """The run of ``configs/milan_block.yaml`` with less fine-tuning, and GRPO where there are settings of it."""
    tree = yaml.safe_load(CONFIG.read_text())
    tree |= {"name": name, "seed": seed, "output_dir": str(work / "runs"), "stages": ["sft"]}
    tree["data"]["store"] = str(work / "milan_block.zarr")
    quarter = -(-sft_steps // 4)
    tree["sft"] |= {"max_steps": sft_steps, "eval_steps": quarter, "save_steps": quarter, "eval_windows": 60}
    if grpo is not None:
        steps = grpo["max_steps"]
        tree["stages"] = ["sft", "grpo"]
        tree["grpo"] = COMMON | {"save_steps": steps, "eval_steps": steps // 2} | grpo
    return VisionLLMRecipe().open(VisionLLMConfig.model_validate(tree), Trainer(work / "runs" / name).group)


def errors(
    policy: PolicyModel, city: CityWindows, count: int, decoding: Decoding, num_generations: int = 1
) -> tuple[ErrorState, np.ndarray]:
    """Of the mean of a cell's candidates, where the decoding makes several: pooled, and each window's mean squared
    error."""
    policy.eval()
    indices = city.evenly(count)
    state, of_windows = ErrorState.empty(policy.spec.setting.horizon), []
    pieces = plan_pieces(len(indices), len(city.cells), 8).chunks()
    for _, batch, values in forecast_pieces(policy, city, indices, pieces, decoding, num_generations):
        forecast = values.mean(2)
        state += ErrorState.of(*(x.transpose(0, 2, 1) for x in (forecast, batch.truth, batch.observed)))
        of_windows.append(((forecast - batch.truth) ** 2).mean((1, 2), where=batch.observed))
    return state, np.concatenate(of_windows)


def scores(run: VisionLLMRun, windows: int, few: int, before: Path) -> Scores:
    """NRMSE of every decoding; and beside the SFT checkpoint, whose windows' errors are written to ``before`` or read
    from it, what became of the windows in one pass."""
    made: Scores = {}
    for name, city in {"validation": run._validation, "test": CityWindows(run.policy, run.test)}.items():
        state, of_windows = errors(run.policy, city, windows, "direct")
        made[name] = {"direct": nrmse(state), "direct, few": nrmse(errors(run.policy, city, few, "direct")[0])}
        made[name] |= {label: nrmse(errors(run.policy, city, few, decoding, g)[0]) for label, decoding, g in SLOW}
        path = before / f"{name}.npy"
        if not path.exists():
            before.mkdir(exist_ok=True)
            np.save(path, of_windows)
            continue
        made[name] |= beside(np.load(path), of_windows, float(state.sum_truth.sum() / state.count.sum()))
    return made


def nrmse(state: ErrorState) -> float:
    return round(float(state.pooled()["nrmse"]), 5)


def beside(before: np.ndarray, after: np.ndarray, mean_truth: float) -> dict[str, float]:
    """Of windows' mean squared errors: how many fell, how much in the middle, and NRMSE before and after without the
    windows that gained most, which strays of a distribution's tail can be."""
    rest = np.argsort(after - before)[MOST_GAINED:]
    figures = {
        "windows_better": (after < before).mean(),
        "median_ratio": np.median(np.sqrt(after / before)),
        "before_without_most_gained": np.sqrt(before[rest].mean()) / mean_truth,
        "without_most_gained": np.sqrt(after[rest].mean()) / mean_truth,
    }
    return {name: round(float(value), 5) for name, value in figures.items()}


@torch.no_grad()
def signal(stage: GRPOStage) -> dict[str, float]:
    """What the advantages of a few steps' candidates are, and what they know of the candidates' squared errors.

    ``correlation``: of reward and minus squared error (over d²) within groups, means of groups subtracted.
    """
    config, policy, g = stage.config, stage.policy, stage.config.num_generations
    rollouts = LocalRollouts(policy, config, stage.batches._key[0])
    rewards, errors = [], []
    for step in range(SIGNAL_BATCHES):
        batch = stage.batches(step)
        completions = completions_of(rollouts.sample(step, batch, "these"), step, batch, ["these"], policy)
        terms = stage._reward(batch, completions)
        truth = torch.from_numpy(batch.truth).flatten(0, 1).float().repeat_interleave(g, 0)
        d = torch.from_numpy(np.tile(stage.cell_mean[batch.cells], len(batch.shared))).float().repeat_interleave(g, 0)
        error = ((completions.values[:, : truth.shape[1]] - truth) ** 2).mean(1) / d**2
        rewards.append(terms.reward.view(-1, g)), errors.append(error.view(-1, g))
    reward, error = torch.cat(rewards), torch.cat(errors)
    centred, worse = (x - x.mean(1, keepdim=True) for x in (reward, error))
    pairs = torch.stack([centred.flatten(), -worse.flatten()])
    each = (centred * -worse).sum(1) / (centred.norm(dim=1) * worse.norm(dim=1)).clamp(min=1e-12)
    return {
        "groups": len(reward),
        "mean_reward": float(reward.mean()),
        "advantage_variance": float(group_advantages(reward, config.scale_rewards).square().mean()),
        "equal_rewards": float((reward.std(1) < 1e-6).float().mean()),
        "correlation": float(torch.corrcoef(pairs)[0, 1]),
        "correlation_within_a_group": float(each.mean()),
        "squared_error": float(error.mean()),
        "largest_squared_error": float(error.max()),
    }


def study_variant(work: Path, seed: int, name: str, sft_steps: int, measure: Callable[..., Scores]) -> dict[str, Any]:
    """GRPO from the seed's SFT checkpoint. Leaves the last weights in the policy and scores them."""
    folder = "".join(letter if letter.isalnum() else "-" for letter in f"seed{seed}-{name}")
    run_dir = work / "runs" / folder
    if not (run_dir / "checkpoints" / "sft").exists():
        shutil.copytree(work / "runs" / f"seed{seed}" / "checkpoints" / "sft", run_dir / "checkpoints" / "sft")
    run = open_run(work, folder, seed, sft_steps, VARIANTS[name])
    trainer = Trainer(run_dir, log=print)
    run.fit("sft", trainer)
    stage = run._stage("grpo", trainer.group)
    assert isinstance(stage, GRPOStage)
    signals = signal(stage)
    # The adapter of GRPO is there once: the stage that is fitted needs a policy of its own.
    run = open_run(work, folder, seed, sft_steps, VARIANTS[name])
    run.fit("sft", trainer)
    summary = run.fit("grpo", trainer)
    load_weights(run.policy, trainer.checkpoints("grpo").step_dir(summary["steps"]))
    trainer.close()
    kept = {key: summary[key] for key in ("before", "last", "steps", "seconds", "checkpoint")}
    return {"settings": COMMON | VARIANTS[name], "signal": signals, "stage": kept, **measure(run)}


def study_seed(work: Path, seed: int, arguments: Any, variants: list[str]) -> dict[str, Any]:
    """Results of a seed by name, ``sft`` first."""
    path = work / f"scores{seed}.json"
    results = json.loads(path.read_text()) if path.exists() else {}

    def measure(run: VisionLLMRun) -> dict[str, Any]:
        began = time.perf_counter()
        measured = scores(run, arguments.windows, arguments.few_windows, work / f"seed{seed}-sft")
        return measured | {"scoring_seconds": round(time.perf_counter() - began, 1)}

    for name in ["sft", *variants]:
        if name in results:
            continue
        if name == "sft":
            run = open_run(work, f"seed{seed}", seed, arguments.sft_steps, None)
            trainer = Trainer(work / "runs" / f"seed{seed}", log=print)
            summary = run.fit("sft", trainer)
            trainer.close()
            results[name] = {"steps": summary["steps"], "seconds": summary["seconds"], **measure(run)}
        else:
            results[name] = study_variant(work, seed, name, arguments.sft_steps, measure)
        path.write_text(json.dumps(results, indent=1))
        print(seed, name, {key: results[name][key] for key in ("validation", "test")}, flush=True)
    return results


def main() -> None:
    arguments = parser(__doc__, runs=3)
    arguments.add_argument("--data", type=Path, default=os.environ.get("STDIST_TEST_DATA"), help="the data's folder")
    arguments.add_argument("--work", type=Path, default=Path("runs/grpo_accuracy"), help="default: %(default)s")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    arguments.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    arguments.add_argument("--headline", choices=list(VARIANTS), default=HEADLINE)
    arguments.add_argument("--sft-steps", type=int, default=1200)
    arguments.add_argument("--windows", type=int, default=142, help="scored in one pass (default: %(default)s)")
    arguments.add_argument("--few-windows", type=int, default=24, help="scored step by step (default: %(default)s)")
    options = arguments.parse_args()
    if options.data is None:
        raise SystemExit("error: this benchmark needs real data; give its folder by --data")
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "milan_block.zarr").exists():
        files = [Path(options.data) / "milan_block_5x5" / "milan_grid_data.csv"]
        place = {"start": "2013-11-01T00:00", "cadence": 10, "row0": 41, "col0": 41, "id_width": 100}
        READERS["table"].prepare(files, options.work / "milan_block.zarr", channel="internet", **place)
    by_seed = {seed: study_seed(options.work, seed, options, options.variants) for seed in options.seeds}
    with_headline = [results for results in by_seed.values() if options.headline in results]
    if not with_headline:
        return
    result = comparison(
        "grpo_accuracy",
        "test NRMSE in one pass",
        [results[options.headline]["test"]["direct"] for results in with_headline],
        "the SFT checkpoint",
        [results["sft"]["test"]["direct"] for results in with_headline],
        f"Milan 5x5, S = K = 12, {options.headline}, last weights; SFT steps "
        + ", ".join(str(results["sft"]["steps"]) for results in with_headline),
        "less",
        mean_ratio=mean(
            results["sft"]["test"]["direct"] / results[options.headline]["test"]["direct"] for results in with_headline
        ),
        seeds={str(seed): results for seed, results in by_seed.items()},
    )
    publish(result, options.json)


if __name__ == "__main__":
    main()
