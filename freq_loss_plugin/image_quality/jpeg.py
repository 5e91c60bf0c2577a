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
# How near the values must be to multiples of the table's, the mean of cos(2pi·value / step): at most 0.1 in photographs
# that were not compressed as badly, at least 0.55 in those that were, and were compressed again. Less than the second
# is no difference.
_LEAST_SCORE, _TIE = 0.52, 0.05
# Of fewer blocks, more is asked, and none that begin elsewhere: gratings have up to 0.6, and by chance 0.9 there.
_LEAST_OF_FEW, _FEW = 0.75, 512
# The factors by which an image may have been resized; how high their comb must be (photographs have up to 5, a halftone
# 7); how near to 1 a factor is none; and of how many places the median is taken out before.
_FACTORS, _LEAST_COMB, _SAME_FACTOR, _MEDIAN = (0.65, 1.5), 7.5, 0.03, 15
_LEAST_FOR_COMB = 200
# Their median distance, of which rounding, clipped pixels and compressing again make 0.3 to 1.3; gratings have more.
_MOST_DISTANCE = 3.0


def quality_of_tables(tables: Mapping[int, Sequence[int]]) -> int | None:
    """libjpeg's quality, 1..100, of a file's quantization tables, luminance first; None without one."""
    if not tables:
        return None
    # Sorted, since programs keep them in different orders.
    table = torch.tensor(sorted(tables[min(tables)]), dtype=torch.float64)
    return 1 + int((_sorted_tables() - table).abs().sum(dim=1).argmin())


def quality_of_pixels(pixels: Tensor) -> int | None:
    """The quality of a bad JPEG that was saved again, in any format, a multiple of 5.

    The coefficients of its 8×8 blocks lie on multiples of the quantization table, also when it was cropped or turned.

    Args:
        pixels: shape (3, H, W), 0..1, at the scale at which it was compressed.

    Returns:
        None where nothing tells of a quality below 75.
    """
    luminance = 255 * torch.einsum("c,chw->hw", pixels.new_tensor([0.299, 0.587, 0.114]), pixels) - 128
    is_small = luminance.numel() < _FEW * 64
    corners = [(0, 0)] if is_small else dict.fromkeys([(0, 0), (_phase(luminance), _phase(luminance.T))])
    for row, column in corners:
        values = _coefficients(luminance[row:, column:])
        if values is not None:
            score, quality = max(_fit(values, turned=turned) for turned in (False, True))
            if score > (_LEAST_OF_FEW if is_small else _LEAST_SCORE):
                return quality
    return None


def resized_by(pixels: Tensor) -> float | None:
    """The factor by which an image was resized after it was compressed as JPEG; None where no blocks are seen.

    The borders of blocks are a comb in the second differences along both axes, whose period is 8 times the factor.

    Args:
        pixels: shape (3, H, W), 0..1.
    """
    luminance = 255 * torch.einsum("c,chw->hw", pixels.new_tensor([0.299, 0.587, 0.114]), pixels)
    if min(luminance.shape) < _LEAST_FOR_COMB:
        return None
    frequencies = 1 / (8 * torch.arange(*_FACTORS, 0.002))
    heights = torch.minimum(_comb(luminance, frequencies), _comb(luminance.T, frequencies))
    factor = float(1 / (8 * frequencies[heights.argmax()]))
    return factor if float(heights.max()) > _LEAST_COMB and abs(factor - 1) > _SAME_FACTOR else None


def _comb(luminance: Tensor, frequencies: Tensor) -> Tensor:
    """How high the two lower ones of three harmonics of each frequency are, as multiples of the spectrum's median."""
    second = (2 * luminance[:, 1:-1] - luminance[:, :-2] - luminance[:, 2:]).abs()
    profile = second.clamp(max=float(second.flatten()[:: max(1, second.numel() // 50_000)].quantile(0.9))).mean(dim=0)
    padded = torch.nn.functional.pad(profile[None], (_MEDIAN // 2, _MEDIAN // 2), mode="replicate")[0]
    profile = (profile - padded.unfold(0, _MEDIAN, 1).median(dim=1).values) * torch.hann_window(len(profile))
    angles = 2 * math.pi * torch.outer(frequencies, torch.arange(len(profile), dtype=profile.dtype))
    heights = [
        torch.hypot((number * angles).cos() @ profile, (number * angles).sin() @ profile) for number in (1, 2, 3)
    ]
    lower = torch.stack(heights).sort(dim=0).values[:2].sum(dim=0)
    return lower / torch.fft.rfft(profile).abs().median().clamp(min=1e-6)


def _phase(luminance: Tensor) -> int:
    """The first row, 0..7, at which blocks begin, by the steps between rows."""
    steps = (luminance[1:] - luminance[:-1]).abs().mean(dim=1)
    if len(steps) < 16:
        return 0
    by_phase = torch.stack([steps[phase::8].mean() for phase in range(8)])
    return (int(by_phase.argmax()) + 1) % 8


def _coefficients(luminance: Tensor) -> Tensor | None:
    """The low frequencies of its blocks, shape (n, 14); None without any block."""
    height, width = (side // 8 * 8 for side in luminance.shape)
    if not height or not width:
        return None
    blocks = luminance[:height, :width].unfold(0, 8, 8).unfold(1, 8, 8).flatten(0, 1)
    if len(blocks) > _MOST_BLOCKS:
        blocks = blocks[blocks.var(dim=(1, 2)).argsort(descending=True)[:_MOST_BLOCKS]]
    rows, columns = _low_frequencies()
    return (_dct() @ blocks @ _dct().T)[:, rows, columns]


def _fit(values: Tensor, *, turned: bool) -> tuple[float, int]:
    """How near these coefficients are to multiples of a table's, and the quality of that table.

    Args:
        values: see `_coefficients`.
        turned: by 90 degrees, after it was compressed.
    """
    rows, columns = _low_frequencies()
    scores = {}
    for quality in _QUALITIES:
        table = _table(quality).T if turned else _table(quality)
        steps = table[rows, columns].to(values.dtype)
        kept = values.abs() > steps / 2
        fits = torch.cos(2 * math.pi / steps * values)
        score = float((fits * kept).sum() / kept.sum().clamp(min=1))
        if score > _LEAST_SCORE and _is_told(values, steps, kept):
            scores[quality] = score
    best = max(scores.values(), default=0.0)
    # A table of half the steps would fit as well: the worst of those that fit.
    return best, min((quality for quality, score in scores.items() if score > best - _TIE), default=0)


def _is_told(values: Tensor, steps: Tensor, kept: Tensor) -> bool:
    """Whether there are enough values, of several frequencies, and near enough to the multiples."""
    some = values[kept]
    distances = (values - steps * (values / steps).round()).abs()[kept]
    is_various = len(some.mul(10).round().unique()) >= _LEAST_VALUES and int(kept.any(dim=0).sum()) >= 3
    return is_various and float(distances.median()) <= _MOST_DISTANCE


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
