"""Folders that are given as ``policy.base`` and are none."""

import json
from pathlib import Path


def why_no_base(folder: Path) -> str | None:
    """Returns what a folder is that is no base, and what to do; None for one that may be a base.

    A checkpoint would open as a model of transformers, and what its numerals have learnt would be gone without a word.
    """
    base, go_on = "a base is a Qwen2.5-VL as published", "`stdist train` on the run's config goes on with it"
    if (folder / "policy.json").is_file():
        own = f"as this one's own, {_base_of(folder)}"
        return f"is a checkpoint of a stdist run, whose numerals and adapter would be lost; {base}, {own}. {go_on}"
    if (folder / "checkpoints").is_dir():
        return f"is the folder of a run; {base}. {go_on}"
    if any((step / "policy.json").is_file() for step in folder.glob("step-*")):
        return f"holds checkpoints of a stdist run; {base}. {go_on}"
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return f"is an adapter without its model; {base}"
    return None


def _base_of(checkpoint: Path) -> str:
    try:
        return str(json.loads((checkpoint / "policy.json").read_text())["base"])
    except (ValueError, KeyError, TypeError):
        return "which it no longer says"
