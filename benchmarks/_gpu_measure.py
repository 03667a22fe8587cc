"""Items of ``gpu.py`` that measure: the machine, a stage's steps beside its plan, rollouts and a sweep.

All run ``configs/single_gpu_32gb.yaml`` on a synthetic city of 100 × 100 cells and a base with random weights. A number
is drawn as often as another by such a base; what a step computes and holds is that of a trained one.

    python benchmarks/_gpu_measure.py stage --stage sft --work runs/gpu --device cuda --base 7b --cap 32
"""

import argparse
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _gpu_base import write_base
from _harness import figure, processor

from data_prep import READERS
from stdist.config import read_tree
from stdist.errors import Interrupted
from stdist.files import to_json
from stdist.runs.devices import DEVICES
from stdist.runs.recipes import parse_config
from stdist.training.loop import Trainer
from stdist.training.process_group import ProcessGroup
from stdist.vision_llm.config import VisionLLMConfig
from stdist.vision_llm.dataset import open_dataset, stage_config
from stdist.vision_llm.doctor import examine
from stdist.vision_llm.learning import begin_stage
from stdist.vision_llm.plan import plan_stage
from stdist.vision_llm.policy.city_windows import CityWindows
from stdist.vision_llm.rollout.forecaster import forecast_pieces, plan_pieces
from stdist.vision_llm.rollout.recorded_step import RECORDINGS
from stdist.vision_llm.rollout.rollouts import LocalRollouts
from stdist.vision_llm.run import VisionLLMRun

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "single_gpu_32gb.yaml"
STEPS = 10
SECONDS = 150
"""Steps or pieces are ended early where they take longer, so that an item stays within its limit."""
RUNS = 3
DAYS = 6
SIDE = {"7b": 100, "tiny": 16}
GIB = 2**30
SMALL = {
    "data.region": "4:7,4:7",
    "data.horizon": "6",
    "numerals.mantissa_digits": "2",
    "alignment.train_batch_size": "8",
    "arithmetic.train_batch_size": "8",
    "sft.windows_per_step": "1",
    "sft.cells_per_window": "4",
    "grpo.windows_per_step": "1",
    "grpo.cells_per_window": "4",
    "grpo.num_generations": "2",
}
"""Changes of the configuration for the base ``tiny``."""
WITH_BACKEND = {
    "sft.optim": "adamw_torch",
    "grpo.optim": "adamw_torch",
    "grpo.windows_per_step": "1",
    "grpo.cells_per_window": "4",
}
"""And where two backends make the same steps: TRL has no four bits, and computes every candidate's frames anew."""
# Cards whose names contain another's.
VARIANTS = {"ti", "super", "laptop", "d", "nvl", "ada", "max-q"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("item", choices=ITEMS)
    parser.add_argument("--stage")
    parser.add_argument("--backend", choices=("stdist", "trl"), help="in small steps of a base in bfloat16, no cap")
    parser.add_argument("--bfloat16", action="store_true", help="not in four bits")
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--cap", type=float, required=True, help="GiB")
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    print(to_json(ITEMS[given.item](given)))


# --- what is there -------------------------------------------------------------------------------------------------


def machine(given: argparse.Namespace) -> dict[str, Any]:
    found = examine() | {"torch": torch.__version__, "cuda": torch.version.cuda, "processor": processor()}
    found["free_disk_gib"] = round(shutil.disk_usage(given.work).free / GIB)
    if given.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / GIB, 2),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver(),
            "peak_flops": peak_flops(properties.name),
        }
    return found


def driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_flops(name: str) -> float | None:
    """By the data sheet of the card that calls itself ``name``; None of one that is not in the table."""
    words = set(re.split(r"[\s-]+", name.lower().replace("gb", " ")))
    known = [key for key in DEVICES if words.issuperset(key.split("-"))]
    if not known or words & VARIANTS:
        return None
    return DEVICES[max(known, key=len)].flops


def city(given: argparse.Namespace) -> dict[str, Any]:
    side, began = SIDE[given.base], time.perf_counter()
    READERS["synthetic"].prepare([], given.work / "city.zarr", height=side, width=side, days=DAYS)
    return {"cells": side * side, "days": DAYS, "seconds": figure(time.perf_counter() - began)}


def base(given: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    size = write_base(given.work / "base", given.base, given.device)
    return {"gb": figure(size / 1e9), "seconds": figure(time.perf_counter() - began)}


def run_config(given: argparse.Namespace, name: str) -> VisionLLMConfig:
    """The card's own configuration, but for the data, the base, and how long it trains and validates."""
    changes = (SMALL if given.base == "tiny" else {}) | (WITH_BACKEND if given.backend else {})
    tree = read_tree(CONFIG, [f"{key}={value}" for key, value in changes.items()])
    del tree["data"]["split"]
    tree["name"], tree["output_dir"] = name, str(given.work / "runs")
    tree["data"]["store"], tree["policy"]["base"] = str(given.work / "city.zarr"), str(given.work / "base")
    tree["policy"]["load_in_4bit"] = not (given.bfloat16 or given.backend)
    tree["backend"] = given.backend or "stdist"
    tree["reuse_alignment"] = False
    for stage in ("alignment", "arithmetic", "sft", "grpo"):
        tree[stage] |= {"max_steps": STEPS, "eval_steps": STEPS, "save_steps": STEPS, "logging_steps": 1}
        tree[stage] |= {"eval_windows": 1} if stage in ("sft", "grpo") else {}
    config = parse_config(tree, str(CONFIG))
    assert isinstance(config, VisionLLMConfig)
    return config


# --- stages --------------------------------------------------------------------------------------------------------


class Enough(Interrupted):
    """The steps have taken all their time."""


class Clock:
    """Hears of every step: the seconds since the one before, its tokens, its loss."""

    def __init__(self, synchronize: Callable[[], None]):
        self._synchronize = synchronize
        self.began = time.perf_counter()
        self.seconds: list[float] = []
        self.tokens: list[float] = []
        self.losses: list[float] = []

    def __call__(self, scalars: dict[str, float]) -> None:
        self._synchronize()
        self.seconds.append(time.perf_counter() - self.began - sum(self.seconds))
        self.tokens.append(scalars.get("tokens", 0))  # TRL logs none
        self.losses.append(scalars["loss"])
        if len(self.seconds) > 1 and sum(self.seconds[1:]) > SECONDS:
            raise Enough


def stage(given: argparse.Namespace) -> dict[str, Any]:
    """Steps of one stage as ``stdist train`` makes them, its validation and checkpoints included, on a policy that has
    begun the stages before; what they took beside what ``stdist plan`` says."""
    is_gpu = given.device.type == "cuda"
    if is_gpu and not given.backend:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, given.cap * GIB / total))
    config = run_config(given, f"stage-{given.stage}")
    shutil.rmtree(config.run_dir, ignore_errors=True)
    plan = plan_stage(config, given.stage)
    began = time.perf_counter()
    run = VisionLLMRun(config, open_dataset(config))
    for name in config.stages[: config.stages.index(given.stage)]:
        begin_stage(run.policy, name, stage_config(config, name).trainable, config.seed)
    loading = time.perf_counter() - began
    memory = {"peak_allocated_gib_while_loading": gib(torch.cuda.max_memory_allocated())} if is_gpu else {}
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    lines: list[str] = []
    clock = Clock(torch.cuda.synchronize if is_gpu else lambda: None)
    trainer = Trainer(config.run_dir, ProcessGroup(), lines.append, clock)
    try:
        run.fit(given.stage, trainer)
    except Enough:
        lines.append(f"ended after {len(clock.seconds)} steps, which took {SECONDS} s")
    finally:
        trainer.close()
        shutil.rmtree(config.run_dir, ignore_errors=True)
    if is_gpu:
        memory |= {
            "peak_allocated_gib": gib(torch.cuda.max_memory_allocated()),
            "peak_reserved_gib": gib(torch.cuda.max_memory_reserved()),
            "cap_gib": None if given.backend else given.cap,
        }
    # The first step comes behind a validation and a checkpoint, and sets libraries up.
    steps = clock.seconds[1:]
    seconds, tokens = statistics.median(steps), statistics.median(clock.tokens[1:])
    peak = peak_flops(torch.cuda.get_device_name()) if is_gpu else None
    planned = {
        "planned_gib": gib(plan.device_bytes),
        "planned_tflop_a_step": figure(plan.flops / 1e12),
        "mfu": None if peak is None else figure(plan.flops / seconds / peak),
        "tokens_a_step": tokens,
        "tokens_a_second": figure(tokens / seconds),
    }
    return {
        "steps": len(clock.seconds),
        "seconds_a_step": figure(seconds),
        "spread": [figure(min(steps)), figure(max(steps))],
        **({} if given.backend == "trl" else planned),  # the plan counts stdist's steps
        **memory,
        "seconds_before_the_first_step_ended": figure(clock.seconds[0]),
        "seconds_of_loading": figure(loading),
        "losses": [figure(loss) for loss in clock.losses],
        "attention": run.policy.attention_choice.reason,
        "log": lines,
    }


def gib(size: float) -> float:
    return round(size / GIB, 3)


# --- sampling ------------------------------------------------------------------------------------------------------


def rollouts(given: argparse.Namespace) -> dict[str, Any]:
    """GRPO's candidates of all cells of one window, with a recorded decoding step and without one."""
    config = run_config(given, "rollouts")
    run = VisionLLMRun(config, open_dataset(config))
    for name in config.stages:
        begin_stage(run.policy, name, stage_config(config, name).trainable, config.seed)
    windows = CityWindows(run.policy, run.train)
    batch = windows.batch(np.array([0]), windows.cells)
    sampler = LocalRollouts(run.policy, config.grpo, config.seed)
    measured = {"cells": len(windows.cells), "candidates_a_cell": config.grpo.num_generations}
    kind = given.device.type
    if kind in RECORDINGS:
        measured["with_cuda_graphs"] = timed_rollouts(sampler, batch)
        sampler.release()
        del RECORDINGS[kind]
    return measured | {"without_cuda_graphs": timed_rollouts(sampler, batch)}


def timed_rollouts(sampler: LocalRollouts, batch: Any) -> dict[str, Any]:
    """The first run, which records and sets libraries up, is told apart."""
    seconds = []
    for _ in range(1 + RUNS):
        began = time.perf_counter()
        candidates = sampler.sample(0, batch, "now")  # ends with a copy to the CPU
        seconds.append(time.perf_counter() - began)
    tokens = sum(int((record.log_probs != 0).sum()) for record in candidates)
    took = statistics.median(seconds[1:])
    peak = {"peak_allocated_gib": gib(torch.cuda.max_memory_allocated())} if torch.cuda.is_available() else {}
    return {
        "tokens": tokens,
        "seconds": figure(took),
        "spread": [figure(min(seconds[1:])), figure(max(seconds[1:]))],
        "tokens_a_second": figure(tokens / took),
        "seconds_of_the_first_run": figure(seconds[0]),
        **peak,
    }


def sweep(given: argparse.Namespace) -> dict[str, Any]:
    """Forecasts of the whole city for one window, piece by piece, by the median of each step."""
    config = run_config(given, "sweep")
    run = VisionLLMRun(config, open_dataset(config))
    data, store = config.data, run.store
    windows = CityWindows(run.policy, store.windows("test", data.history, data.horizon, channel=data.channel))
    pieces = list(plan_pieces(1, len(windows.cells), 1).chunks())
    cells: list[int] = []
    seconds: list[float] = []
    began = time.perf_counter()
    for _, batch, _ in forecast_pieces(run.policy, windows, np.array([0]), pieces, "median"):
        cells.append(len(batch.prompts))
        seconds.append(time.perf_counter() - began - sum(seconds))
        if sum(seconds) > SECONDS:
            break
    # The first piece encodes the window, records, and sets libraries up.
    warm = slice(1, None) if len(cells) > 1 else slice(None)
    return {
        "cells": len(windows.cells),
        "forecast": sum(cells),
        "steps": data.horizon,
        "cells_a_second": figure(sum(cells[warm]) / sum(seconds[warm])),
        "seconds_of_pieces": [figure(each) for each in seconds],
        "cells_of_pieces": cells,
    }


ITEMS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    function.__name__: function for function in (machine, city, base, stage, rollouts, sweep)
}

if __name__ == "__main__":
    main()
