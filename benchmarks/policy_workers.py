"""What a pool of workers costs and gains: steps on and off policy, syncs of weights, sweeps; each side in the same run.

    pip install -c constraints.txt -e ".[cluster]"
    python benchmarks/policy_workers.py --json

Steps: a GRPO stage with one worker in another process, on one core each. Off policy (``max_staleness`` 1) a step
should cost what its longer phase costs alone, on policy the sum of both: the worker's seconds of sampling, and what a
learner does while it does not wait, as the log of the run on policy has them. Sync: a LoRA of rank 16 and the rows of
199,801 numerals of a narrow model, from the learner's tensors to verified ones in the worker; what that is of a step of
a 7B is arithmetic: its bytes at this machine's seconds a byte, over the seconds that docs/scaling.md plans. Sweep: a
day of a grid by 1 and by 2 workers, the time to start them included.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import json
import logging
import secrets
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from _harness import figure, parser, processor, publish

os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  no side is nicer than the other

try:
    import ray
except ImportError:
    sys.exit("Ray is not installed; pip install -c constraints.txt -e '.[cluster]'")

from data_prep import READERS
from stdist.data import open_store
from stdist.orchestration import learners
from stdist.orchestration.policy_workers.sweep import sweep
from stdist.runs.forecast_request import ForecastRequest
from stdist.runs.recipes import load_config

STEPS, SKIPPED = 24, 4
SIDE, DAYS, CELLS, WINDOWS, GROUP = 20, 12, 24, 4, 8
SWEPT = 100
BYTES_7B, STEP_7B = 1.59e9, 9.03
"""Of `configs/milan_7b.yaml` as `stdist plan` says: a version, and the seconds in which learners train on a step."""
STAGE = {"logging_steps": 1, "warmup_steps": 2, "learning_rate": 1e-4, "eval_windows": 1}


def config_of(folder: Path, store: Path) -> Path:
    tree = {
        "name": "bench",
        "output_dir": str(folder / "runs"),
        "stages": ["sft", "grpo"],
        "data": {"store": str(store), "history": 6, "horizon": 6, "region": f"0:{SIDE},0:{SIDE}"},
        "numerals": {"mantissa_digits": 2},
        "policy": {"base": "tiny"},
        "sft": STAGE | {"trainable": "full", "max_steps": 2, "save_steps": 2, "eval_steps": 2},
        "grpo": STAGE
        | {"max_steps": STEPS, "save_steps": STEPS, "eval_steps": STEPS, "windows_per_step": WINDOWS}
        | {"cells_per_window": CELLS, "num_generations": GROUP},
        "rollouts": {"num_workers": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def lines_of(config: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    """Trains; returns what the log says of GRPO's steps but for the first ones, with the seconds of each."""
    loaded = load_config(config, [f"name={name}", *overrides])
    learners.train(loaded, lambda line: None)
    lines = [json.loads(line) for line in (loaded.run_dir / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["stage"] == "grpo" and "event" not in line]
    times = np.diff([line["time"] for line in steps])
    return [line | {"step_seconds": t} for line, t in zip(steps[1:], times, strict=True)][SKIPPED:]


def median(lines: list[dict[str, Any]], *names: str) -> float:
    return statistics.median(sum(line[name] for name in names) for line in lines)


def steps(config: Path) -> dict[str, Any]:
    """On policy a step against the sum of both phases, off policy against the longer one."""
    on = lines_of(config, "on-policy")
    off = lines_of(config, "off-policy", "rollouts.max_staleness=1")
    sample = median(on, "worker_seconds/prefill", "worker_seconds/decode")
    learn = statistics.median(line["step_seconds"] - line["seconds/wait"] for line in on)
    times = {name: [line["step_seconds"] for line in lines] for name, lines in (("on", on), ("off", off))}
    return {
        "on_policy": figure(statistics.median(times["on"])),
        "sum_of_phases": figure(sample + learn),
        "on_policy_ratio": figure(statistics.median(times["on"]) / (sample + learn)),
        "off_policy": figure(statistics.median(times["off"])),
        "longer_phase": figure(max(sample, learn)),
        "off_policy_ratio": figure(statistics.median(times["off"]) / max(sample, learn)),
        "phases": {"sample": figure(sample), "learn": figure(learn)},
        "quartiles": {name: [figure(float(q)) for q in np.quantile(t, (0.25, 0.75))] for name, t in times.items()},
        "steps": len(on),
    }


def sync(config: Path) -> dict[str, Any]:
    """Seconds a GB, from the learner's tensors to verified ones in the worker: four digits have 199,801 rows."""
    few = ["grpo.max_steps=10", "grpo.save_steps=10", "grpo.eval_steps=10", "grpo.cells_per_window=2"]
    few += ["data.region=0:2,0:2"]
    lines = lines_of(config, "sync", "numerals.mantissa_digits=4", "policy.lora_r=16", *few)
    sent = np.diff([line["workers/bytes_sent"] for line in lines])
    sent = float(np.median(sent[sent > 0]))
    seconds = median(lines, "seconds/sync", "workers/load_seconds")
    return {
        "bytes": int(sent),
        "seconds": figure(seconds),
        "seconds_per_gb": figure(seconds / sent * 1e9),
        "share_of_a_7b_step": figure(seconds / sent * BYTES_7B / STEP_7B),
    }


def sweeps(folder: Path, store: Path, runs: int) -> dict[str, Any]:
    """Seconds of a day of a whole grid by 1 and by 2 workers, in turn."""
    config = config_of(folder, store)
    run = load_config(config, ["name=swept", "stages=[sft]", "data.region=0:2,0:2"])
    learners.train(run, lambda line: None)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    day = str(open_store(store).local_times[-30])[:10]
    for number in range(runs):
        for workers in seconds:
            out = folder / f"{workers}-{number}.zarr"
            request = ForecastRequest(run.run_dir, store, f"0:{SWEPT},0:{SWEPT}", f"{day}:{day}", out)
            began = time.perf_counter()
            sweep(request, workers, None, lambda line: None)
            seconds[workers].append(time.perf_counter() - began)
    one, two = (statistics.median(seconds[workers]) for workers in (1, 2))
    return {"one": figure(one), "two": figure(two), "ratio": figure(one / two), "runs": seconds}


def main() -> None:
    chosen = parser(__doc__, runs=1).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, large = folder / "small.zarr", folder / "large.zarr"
        for store, side in ((small, SIDE), (large, SWEPT)):
            READERS["synthetic"].prepare([], store, height=side, width=side, days=DAYS, cadence=60, seed=1)
        config = config_of(folder, small)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        result = {"steps": steps(config), "sync": sync(config), "sweep": sweeps(folder, large, chosen.runs)}
    publish(
        {
            "name": "policy_workers",
            "value": result["steps"]["off_policy_ratio"],
            "unit": "a step with max_staleness 1 against its longer phase alone",
            "setting": f"preset tiny, {WINDOWS} windows x {CELLS} cells, G {GROUP}, S 6, K 6; 1 learner, 1 worker; "
            f"a sweep of 19 windows of {SWEPT} x {SWEPT} cells; {processor()}",
            **result,
        },
        chosen.json,
    )


if __name__ == "__main__":
    main()
