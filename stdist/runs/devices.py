"""Devices that a run is planned for, by name: memory and operations a second, by their vendor's data sheets.

The sheets named below were not at hand when this was written. The figures of 3090, 4080, 4090, H200 and B200 agree with
tables of others; the rest stand from memory, and a device's own can be given beside its name.

Operations are dense bfloat16 products with float32 sums; where a sheet prints "with sparsity", half of it stands here.
Memory is the sheet's GB of 10⁹ bytes, which is never more than the device really shows to a program.
"""

import difflib
import math
from dataclasses import dataclass

from stdist.errors import InputError
from stdist.runs.memory_plan import MFU, PEAK_FLOPS


@dataclass(frozen=True)
class Device:
    """One learner's. ``memory``: bytes, None where it is not known; ``flops``: its peak a second; ``mfu``: the share of
    the peak that a step reaches."""

    memory: int | None = None
    flops: float = PEAK_FLOPS
    mfu: float = MFU

    @property
    def sustained(self) -> float:
        """Operations a second of a step."""
        return self.flops * self.mfu


GB = 10**9
DEVICES = {
    "3090": Device(24 * GB, 71e12),  # NVIDIA Ampere GA102 whitepaper, appendix: 71 dense, 142 sparse
    "4080": Device(16 * GB, 97.5e12),  # NVIDIA Ada GPU architecture whitepaper, appendix A
    "4090": Device(24 * GB, 165.2e12),  # the same: 165.2 dense, 330.4 sparse
    "5080": Device(16 * GB, 112.6e12),  # NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A
    "5090": Device(32 * GB, 209.5e12),  # the same: 209.5 dense, 419 sparse
    "a6000": Device(48 * GB, 154.8e12),  # NVIDIA Ampere GA102 whitepaper: 154.8 dense, 309.7 sparse
    "l4": Device(24 * GB, 121e12),  # NVIDIA L4 data sheet: 242 with sparsity
    "l40s": Device(48 * GB, 362e12),  # NVIDIA L40S data sheet: 362 dense, 733 with sparsity
    "a100-40": Device(40 * GB, 312e12),  # NVIDIA A100 data sheet: 312 dense, 624 with sparsity
    "a100-80": Device(80 * GB, 312e12),
    "h100": Device(80 * GB, PEAK_FLOPS),  # NVIDIA H100 data sheet, SXM: 1,979 with sparsity
    "h100-pcie": Device(80 * GB, 756e12),  # the same sheet, PCIe: 1,513 with sparsity
    "h200": Device(141 * GB, PEAK_FLOPS),  # NVIDIA H200 data sheet: 1,979 with sparsity
    "b200": Device(180 * GB, 2250e12),  # NVIDIA HGX B200 data sheet: 36 PFLOP/s with sparsity on eight
}


def device(
    name: str | None = None, memory: int | None = None, flops: float | None = None, mfu: float | None = None
) -> Device:
    """The device called ``name``, an H100 of unknown memory without one; every other figure that is given wins.

    Raises InputError for a name that is none, with the nearest ones, and for figures that cannot be.
    """
    known = Device() if name is None else DEVICES.get(name.lower())
    if known is None:
        assert name is not None
        key = name.lower()
        near = [each for each in DEVICES if key in each] or difflib.get_close_matches(key, DEVICES, cutoff=0.4)
        raise InputError(
            f"--device {name!r} is not known; nearest: {', '.join(near or DEVICES)}; "
            "or give --device-memory and --device-flops of its data sheet"
        )
    if flops is not None and not 0 < flops < math.inf:
        raise InputError(f"--device-flops is {flops}; give operations a second, as 312e12")
    if mfu is not None and not 0 < mfu <= 1:
        raise InputError(f"--mfu is {mfu}; give the share of the device's peak that a step reaches, as 0.22")
    return Device(memory or known.memory, flops or known.flops, mfu or known.mfu)
