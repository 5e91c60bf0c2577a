"""With which quality an image was compressed as JPEG: from its file, or from the pixels of one that was saved again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

# The luminance table of the JPEG standard (ITU-T T.81, annex K.1), which libjpeg scales by the quality.
_STANDARD = torch.tensor(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    dtype=torch.float64,
)
_QUALITIES = range(5, 75, 5)
# The low frequencies, which keep most values: row + column of at most this.
_HIGHEST_SUM = 4
# So many different values are needed: the blocks of a pattern with a period of 8 pixels are all alike.
_LEAST_VALUES, _MOST_BLOCKS = 40, 2048
# How near the values must be to multiples of the table's: the mean of cos(2pi·value / step), 1 being on them, and the
# median distance, of which rounding and clipped pixels make 0.3 to 2.
_LEAST_SCORE, _MOST_DISTANCE = 0.75, 3.0


def quality_of_tables(tables: Mapping[int, Sequence[int]]) -> int | None:
    """libjpeg's quality, 1..100, of a file's quantization tables, luminance first; None without one."""
    if not tables:
        return None
    # Sorted, since programs keep them in different orders.
    table = torch.tensor(sorted(tables[min(tables)]), dtype=torch.float64)
    return 1 + int((_sorted_tables() - table).abs().sum(dim=1).argmin())


def quality_of_pixels(pixels: Tensor) -> int | None:
    """The quality of a bad JPEG that was saved in another format, a multiple of 5.

    The coefficients of its 8×8 blocks lie on multiples of the quantization table.

    Args:
        pixels: shape (3, H, W), 0..1, uncropped and at the size at which it was compressed.

    Returns:
        None where nothing tells of a quality below 75.
    """
    luminance = 255 * torch.einsum("c,chw->hw", pixels.new_tensor([0.299, 0.587, 0.114]), pixels) - 128
    height, width = (side // 8 * 8 for side in luminance.shape)
    if not height or not width:
        return None
    blocks = luminance[:height, :width].unfold(0, 8, 8).unfold(1, 8, 8).flatten(0, 1)
    if len(blocks) > _MOST_BLOCKS:
        blocks = blocks[blocks.var(dim=(1, 2)).argsort(descending=True)[:_MOST_BLOCKS]]
    rows, columns = _low_frequencies()
    values = (_dct() @ blocks @ _dct().T)[:, rows, columns]
    for quality in _QUALITIES:  # the worst first: a divisor of its steps would fit as well
        steps = _table(quality)[rows, columns].to(values.dtype)
        kept = values.abs() > steps / 2
        different = values[kept].mul(10).round().unique()
        if len(different) < _LEAST_VALUES or int(kept.any(dim=0).sum()) < 3:
            continue
        distances = (values - steps * (values / steps).round()).abs()[kept]
        score = torch.cos(2 * math.pi * values / steps)[kept].mean()
        if score > _LEAST_SCORE and distances.median() < _MOST_DISTANCE:
            return quality
    return None


def _table(quality: int) -> Tensor:
    """libjpeg's table of a quality."""
    percent = 5000 / quality if quality < 50 else 200 - 2 * quality
    return ((_STANDARD * percent + 50) / 100).floor().clamp(1, 255)


@lru_cache(maxsize=1)
def _sorted_tables() -> Tensor:
    """The values of the tables of qualities 1 to 100, shape (100, 64)."""
    return torch.stack([_table(quality).flatten().sort().values for quality in range(1, 101)])


def _low_frequencies() -> tuple[list[int], list[int]]:
    """Rows and columns of the coefficients that are looked at."""
    places = [(row, column) for row in range(8) for column in range(8) if 0 < row + column <= _HIGHEST_SUM]
    return [row for row, _ in places], [column for _, column in places]


@lru_cache(maxsize=1)
def _dct() -> Tensor:
    """The orthonormal discrete cosine transform of 8 values, shape (8, 8)."""
    rows, columns = torch.arange(8)[:, None], torch.arange(8)
    matrix = torch.cos(math.pi * (2 * columns + 1) * rows / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix
