"""Traffic grids as images (Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 8–11).

A grid is compressed by a power law, copied into three channels, enlarged by a whole factor, padded to whole merged
patches and cut into patches, all on tensors. Equal to the Hugging Face image processor wherever that one does not
rescale; no image library is on the path. Padding instead of rescaling is what N = ⌈H/L⌉·⌈W/L⌉ implies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

PATCH = 14
MERGE = 2
TEMPORAL_PATCH = 2
SMALLEST_SIDE = 112  # pixels: below this a frame gives the encoder fewer than 4×4 merged patches

Grids = Float[Tensor, "windows frames rows cols"]


def power_law(grids: Float[Tensor, "..."], power: float, t_max: float) -> Float[Tensor, "..."]:
    """Eq. 8: D^p / t_max^p. Values above ``t_max``, possible after the training span, clip to 1 (see ``clipped``)."""
    return (grids.clamp(min=0) / t_max).clamp(max=1.0).pow(power)


def clipped(grids: np.ndarray, t_max: float) -> int:
    """The number of values that ``power_law`` clips."""
    return int((grids > t_max).sum())


def pixels_per_cell(height: int, width: int) -> int:
    """Smallest whole enlargement that makes the shorter side at least 112 pixels."""
    return max(1, -(-SMALLEST_SIDE // min(height, width)))


@dataclass(frozen=True)
class FrameGeometry:
    """Sizes of an H×W grid as patches: the numbers behind Eq. 11.

    ``scale`` is pixels per cell; ``patch_rows`` × ``patch_cols`` the patches of one frame, both even.
    """

    height: int
    width: int
    scale: int

    @property
    def patch_rows(self) -> int:
        return _padded(self.height * self.scale) // PATCH

    @property
    def patch_cols(self) -> int:
        return _padded(self.width * self.scale) // PATCH

    @property
    def patches(self) -> int:
        """N of Eq. 11 with L = 14, rounded up to whole 2×2 merges."""
        return self.patch_rows * self.patch_cols

    @property
    def tokens(self) -> int:
        """Visual tokens the language model sees for one frame."""
        return self.patches // MERGE**2


def _padded(pixels: int) -> int:
    unit = PATCH * MERGE
    return -(-pixels // unit) * unit


@dataclass(frozen=True)
class FrameEncoder:
    """Grids in the data's units to the ``pixel_values`` of Qwen2.5-VL.

    Args:
        geometry: grid size and enlargement.
        power: p of Eq. 8, in (0, 1].
        t_max: largest observed value of the channel over the training span, in the data's units.
        mean, std: the vision encoder's own channel statistics.
    """

    geometry: FrameGeometry
    power: float
    t_max: float
    mean: Sequence[float]
    std: Sequence[float]

    def pixels(self, grids: Grids) -> Float[Tensor, "windows frames channel height width"]:
        """Eq. 8–10, enlarged, padded with black and normalised with the encoder's statistics."""
        normalised = power_law(grids, self.power, self.t_max)
        g = self.geometry
        enlarged = normalised.repeat_interleave(g.scale, -2).repeat_interleave(g.scale, -1)
        bottom = g.patch_rows * PATCH - enlarged.shape[-2]
        right = g.patch_cols * PATCH - enlarged.shape[-1]
        image = torch.nn.functional.pad(enlarged, (0, right, 0, bottom)).unsqueeze(-3)
        mean = torch.tensor(self.mean, dtype=image.dtype, device=image.device).view(3, 1, 1)
        std = torch.tensor(self.std, dtype=image.dtype, device=image.device).view(3, 1, 1)
        return (image - mean) / std

    def __call__(self, grids: Grids) -> tuple[Float[Tensor, "patches 1176"], Int[Tensor, "images 3"]]:
        """Eq. 11–12: patches in the encoder's order (merge blocks first) and the (t, h, w) of every image."""
        images = self.pixels(grids).flatten(0, 1)
        n, (rows, cols) = len(images), (self.geometry.patch_rows, self.geometry.patch_cols)
        blocks = images.view(n, 3, rows // MERGE, MERGE, PATCH, cols // MERGE, MERGE, PATCH)
        blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        # A still image fills the encoder's temporal patch with two copies of itself.
        patches = blocks.expand(*blocks.shape[:6], TEMPORAL_PATCH, PATCH, PATCH).reshape(n * rows * cols, -1)
        thw = torch.tensor([1, rows, cols], device=grids.device).expand(n, 3)
        return patches, thw.contiguous()
