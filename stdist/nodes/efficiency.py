"""The cost of a training, to stand beside its errors: time, memory and parameters, on named hardware."""

import platform
import resource
from pathlib import Path

import psutil
import torch
from torch import nn

MEMORY_UNIT = 1 if platform.system() == "Darwin" else 1024
"""Bytes that ``ru_maxrss`` counts in."""


def hardware(device: torch.device, processes: int) -> str:
    """The device, or the processor and how many of its cores one of ``processes`` computes with."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(info) if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{processes} x {torch.get_num_threads()} threads of {name} ({psutil.cpu_count()} cores)"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device since the process began, or of the whole process where it computes on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MEMORY_UNIT


def count(model: nn.Module, *, trained: bool = False) -> int:
    """Parameters of ``model``, or those that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)
