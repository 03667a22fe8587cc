"""One of several learners without Ray, which lives through many trainings: importing costs more than they do.

    python learner.py RANK WORLD FOLDER

For every line of standard input, ``{"config": PATH, "overrides": [...], "file_size": BYTES or null}``, it trains and
prints ``{"error": "KIND: message" or null, "said": [...]}``. FOLDER holds the processes' store and traps.
"""

import gc
import json
import os
import resource
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import traps

from stdist.runs import recipes
from stdist.runs.recipes import load_config


def collect_in_first_step(scalars: dict[str, float]) -> None:
    """What the engine of the stage before left behind goes while the next one is at work."""
    if scalars["step"] == 1:
        gc.collect()


def train(order: dict[str, Any]) -> dict[str, Any]:
    """``file_size``: the size at which a file of this process can grow no more, as on a full disk."""
    said: list[str] = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if order["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_size"], limits[1]))
    try:
        recipes.learn(load_config(Path(order["config"]), order["overrides"]), said.append, collect_in_first_step)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "said": said}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return {"error": None, "said": said}


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    traps.install(folder)
    os.environ["LOCAL_RANK"] = str(rank)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(train(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
