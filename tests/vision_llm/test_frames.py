"""Traffic grids as images (Vision-LLMs for Spatiotemporal Traffic Forecasting, Eq. 8–11)."""

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from stdist.vision_llm.policy.frames import FrameEncoder, FrameGeometry, clipped, pixels_per_cell, power_law

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def test_eq_8_power_law_by_hand() -> None:
    grid = torch.tensor([0.0, 25.0, 100.0])
    assert power_law(grid, power=0.5, t_max=100.0).tolist() == pytest.approx([0.0, 0.5, 1.0])
    # 12.5^(1/3) / 100^(1/3) = (1/8)^(1/3)
    assert power_law(torch.tensor([12.5]), power=1 / 3, t_max=100.0).item() == pytest.approx(0.5)


def test_eq_8_values_above_t_max_clip_to_one_and_are_counted() -> None:
    grids = torch.tensor([[99.0, 101.0], [400.0, 100.0]])
    normalised = power_law(grids, power=0.5, t_max=100.0)
    assert normalised.flatten().tolist() == pytest.approx([0.99**0.5, 1.0, 1.0, 1.0])
    assert normalised.max() <= 1.0
    assert clipped(grids.numpy(), t_max=100.0) == 2


@pytest.mark.parametrize(
    ("height", "width", "scale", "patch_rows", "patch_cols"),
    [
        (5, 5, 23, 10, 10),  # 115 pixels → 140
        (100, 100, 2, 16, 16),  # 200 → 224
        (117, 98, 2, 18, 14),  # 234 → 252, 196 = 7·28 needs no padding
        (10, 20, 12, 10, 18),  # 120 → 140, 240 → 252
        (1, 1, 1, 2, 2),  # one pixel still fills a merged patch
    ],
)
def test_eq_11_patches_round_up_to_whole_merges(
    height: int, width: int, scale: int, patch_rows: int, patch_cols: int
) -> None:
    geometry = FrameGeometry(height, width, scale)
    assert (geometry.patch_rows, geometry.patch_cols) == (patch_rows, patch_cols)
    assert geometry.patches == patch_rows * patch_cols  # N
    assert geometry.tokens == patch_rows * patch_cols // 4
    encoder = FrameEncoder(geometry, 0.5, 1.0, MEAN, STD)
    patches, thw = encoder(torch.rand(2, 3, height, width))
    assert patches.shape == (6 * geometry.patches, 3 * 2 * 14 * 14)
    assert thw.tolist() == [[1, patch_rows, patch_cols]] * 6


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(5, 5, 23), (100, 100, 2), (117, 98, 2), (10, 20, 12), (112, 300, 1), (500, 400, 1)],
)
def test_auto_pixels_per_cell_is_the_smallest_that_reaches_112(height: int, width: int, expected: int) -> None:
    scale = pixels_per_cell(height, width)
    assert scale == expected
    assert min(height, width) * scale >= 112
    assert scale == 1 or min(height, width) * (scale - 1) < 112


def test_eq_9_and_10_three_equal_channels_enlarged_and_padded_with_black() -> None:
    grids = torch.tensor([[[[0.0, 1.0], [4.0, 9.0], [16.0, 25.0]]]])  # 3×2 cells
    encoder = FrameEncoder(FrameGeometry(3, 2, 10), power=0.5, t_max=25.0, mean=(0, 0, 0), std=(1, 1, 1))
    pixels = encoder.pixels(grids)
    assert pixels.shape == (1, 1, 3, 56, 28)
    for channel in range(3):
        assert torch.equal(pixels[0, 0, channel], pixels[0, 0, 0])
    image = pixels[0, 0, 0]
    for row in range(3):
        for col in range(2):
            square = image[10 * row : 10 * row + 10, 10 * col : 10 * col + 10]
            expected = float(grids[0, 0, row, col]) ** 0.5 / 5
            assert torch.allclose(square, torch.full_like(square, expected))
    assert image[30:].abs().max() == 0 and image[:, 20:].abs().max() == 0
    # Padding is black before it is normalised, not the encoder's mean.
    shifted = FrameEncoder(FrameGeometry(3, 2, 10), 0.5, 25.0, MEAN, STD).pixels(grids)
    assert shifted[0, 0, :, -1, -1].tolist() == pytest.approx([-m / s for m, s in zip(MEAN, STD, strict=True)])


@pytest.mark.parametrize("shape", [(5, 5), (6, 9), (17, 14)])
def test_patches_equal_the_hugging_face_processor(shape: tuple[int, int]) -> None:
    """Same float image, no rescaling on either side: the same values in the same order."""
    processor = Qwen2VLImageProcessorPil()
    geometry = FrameGeometry(*shape, scale=12)
    encoder = FrameEncoder(geometry, 0.5, 100.0, processor.image_mean, processor.image_std)
    grids = torch.rand(1, 2, *shape, generator=torch.Generator().manual_seed(0)) * 100
    patches, thw = encoder(grids)

    normalised = power_law(grids[0], 0.5, 100.0)
    enlarged = np.kron(normalised.numpy(), np.ones((12, 12), np.float32))
    images = np.zeros((2, geometry.patch_rows * 14, geometry.patch_cols * 14, 3), np.float32)
    images[:, : enlarged.shape[1], : enlarged.shape[2]] = enlarged[..., None]
    theirs = processor(
        images=list(images), do_resize=False, do_rescale=False, return_tensors="pt", input_data_format="channels_last"
    )
    assert torch.equal(thw, theirs["image_grid_thw"])
    assert torch.allclose(patches, theirs["pixel_values"], rtol=0, atol=1e-6)


def test_whole_processor_agrees_where_it_does_not_rescale() -> None:
    """8-bit image of 112×140, a size the processor keeps: its own defaults give the same pixel values."""
    processor = Qwen2VLImageProcessorPil()
    levels = torch.randint(0, 256, (1, 1, 8, 10), generator=torch.Generator().manual_seed(1))
    encoder = FrameEncoder(FrameGeometry(8, 10, 14), 1.0, 255.0, processor.image_mean, processor.image_std)
    patches, thw = encoder(levels.float())
    image = np.kron(levels[0, 0].numpy().astype(np.uint8), np.ones((14, 14), np.uint8))
    theirs = processor(images=np.repeat(image[..., None], 3, axis=-1), return_tensors="pt")
    assert thw.tolist() == theirs["image_grid_thw"].tolist() == [[1, 8, 10]]
    assert torch.allclose(patches, theirs["pixel_values"], rtol=0, atol=2e-6)
