"""The machine as a training run finds it: devices, attention back ends with the reason for the choice, packages."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from stdist.vision_llm.kernels.attention import choose

PACKAGES = (
    "stdist",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "flash-attn",
    "xformers",
    "zarr",
    "ray",
    "deepspeed",
)


def examine() -> dict[str, Any]:
    """``machine``, ``devices`` (with ``attention`` by dtype), ``packages`` (None: not installed) and ``ray``, whether
    clusters with token authentication can be joined, as plain JSON."""
    cuda = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        },
        "devices": [_device(device) for device in [torch.device("cpu"), *cuda]],
        "packages": {name: _version(name) for name in PACKAGES},
        "ray": _ray_token(),
    }


def as_lines(findings: dict[str, Any]) -> str:
    machine = findings["machine"]
    lines = [
        f"machine: {machine['platform']}, Python {machine['python']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB"
    ]
    for device in findings["devices"]:
        lines.append(f"{device['device']}: {device['name']}")
        for dtype, choice in device["attention"].items():
            lines.append(f"  attention in {dtype}: {choice['reason']}")
            lines += [f"    passed over {reason}" for reason in choice["passed_over"]]
    packages = [f"{name} {number or 'absent'}" for name, number in findings["packages"].items()]
    ray = findings["ray"]
    token = f"a token in {ray['token']}" if ray["token"] else "no token (`ray get-auth-token --generate` makes one)"
    mode = f"RAY_AUTH_MODE={ray['mode']}" if ray["mode"] else "RAY_AUTH_MODE not set"
    return "\n".join([*lines, f"packages: {', '.join(packages)}", f"ray: {mode}, {token}"])


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
    else:
        name = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    choices = {str(dtype).removeprefix("torch."): choose(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    attention = {
        dtype: {"back_end": choice.attention.name, "reason": choice.reason, "passed_over": list(choice.tried)}
        for dtype, choice in choices.items()
    }
    return {"device": str(device), "name": name, "attention": attention}


def _ray_token() -> dict[str, str | None]:
    """The place of Ray's token, in the order in which Ray looks for it; the token itself is nobody's to print."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    place = "RAY_AUTH_TOKEN" if os.environ.get("RAY_AUTH_TOKEN") else str(path) if path.is_file() else None
    return {"mode": os.environ.get("RAY_AUTH_MODE") or None, "token": place}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
