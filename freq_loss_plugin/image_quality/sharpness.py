r"""How much fine detail an image has, against the power law that its coarse detail follows.

In photographs and drawings, power falls like :math:`P(f) \propto f^{-n}`, with n from 1 to 3. That of an image that was
enlarged or blurred falls faster from some frequency on. So in every tile of 32×32 pixels a law is fitted to the power
of two rings of low frequencies, and continued to three rings above them. The shortfall of a ring

.. math:: d = 10 \log_{10} \frac{P - 0.7 N}{P_{law}}

is that of the sharpest tiles: what is in focus anywhere counts. N, the power of noise, is what remains in the quietest
tiles when a texture is taken out of it that falls as fast as f^-2. A tile says nothing of a ring where the law expects
less than four times the noise, nor where it has one frequency alone, as a grating does. Where the power of
most tiles grows with frequency, as in a halftone, there is no law at all.

The same is asked of the image at a half, a quarter, and so on of its size. The finest size at which the lowest of the
three rings is there tells at which frequency the detail ends, and with it the effective resolution. In each of four
directions this is asked alone, too: motion takes detail out of one of them.

Source: D. J. Field (1987), Relations between the statistics of natural images and the response properties of cortical
cells, JOSA A 4; thresholds: benchmarks/image_quality.py.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .pixels import without_borders

_TILE = 32
# About so many tiles are looked at; those of small images overlap by half.
_MOST_TILES = 1000
# Fewer say nothing.
_LEAST_TILES = 9
# Borders of the rings, in cycles per pixel: two to which the law is fitted, and three that it is continued to.
_RINGS = 1 / 21, 1 / 11, 1 / 6, 1 / 4, 0.36, 0.5
_CENTERS = tuple((low + high) / 2 for low, high in pairwise(_RINGS))
_FITTED = 2
_DIRECTIONS = 4
# n of the law; and the least of what is fitted in most tiles that have contrast (power in the second ring).
_LEAST_EXPONENT, _STEEPEST = 1.0, 3.0
_CONTRAST, _MOST_WITHOUT_LAW = 2.0, 0.4
# The least power of noise, on the scale 0..255: rounding, and what JPEG leaves of it.
_LEAST_NOISE = 0.5
# Tiles that are nearly black or white have lost theirs. They count where most are: on paper.
_DARKEST, _BRIGHTEST = 12, 243
# How much of it is taken out, and how many times it the law must expect.
_SURE_NOISE, _LEAST_SIGNAL = 0.7, 4.0
# At a size with more noise than this (standard deviation), detail cannot be told from it.
_MOST_NOISE = 10.0
# The sharpest tiles: of those that say something, this fraction, and at least so many.
_SHARPEST, _LEAST_SAYING = 0.03, 4
# The shortfall in dB from which on a ring is not there, in all directions together, or in one; at the next smaller
# size, this much more.
_MISSING, _MISSING_IN_ONE, _CONFIRMED = -5.0, -6.0, 3.0
_LEAST_SHORTFALL = -25.0
# What one frequency alone has of the power times f^2.
_TONE = 0.9
# An image that was enlarged n times by the usual methods falls short from 1 / (this times n) cycles per pixel on.
_CUTOFF_OF_ENLARGING = 1.5
# Detail that ends in one direction below this fraction of where it ends in all of them was lost by motion, unless there
# is this much more of it at the highest frequencies than the law expects (in dB), as in text.
_MOTION, _MOST_EXCESS = 0.93, 4.0
# With more detail than this, an image is good: it could be a soft photograph, and little is missing.
WORST_GOOD = 0.54
# And in the direction that has least.
_WORST_OF_ONE = 0.6
# From the middle of one ring to that of the next.
_STEP = _CENTERS[-1] / _CENTERS[-2]
_SIZES = 5
# An image with fewer sizes than this is too small.
_LEAST_SIZES = 3


class Sharpness(NamedTuple):
    """What the spectrum says.

    Attributes:
        resolution: effective resolution, as a fraction of the pixels along each side; the geometric mean over both axes
            where it differs between directions. 1 where nothing is missing, None where the spectrum cannot tell.
        is_motion: whether the detail is missing in one direction.
        shortfall: how much is missing in the first ring that is not there, in dB.
        frequency: where that ring begins, in cycles per pixel.
        noise: standard deviation of the luminance's noise, on the scale 0..255; None where that is not known.
    """

    resolution: float | None
    is_motion: bool
    shortfall: float
    frequency: float
    noise: float | None


class _Level(NamedTuple):
    """One size of the image.

    Attributes:
        noise: standard deviation.
        shortfalls: of the three rings, in dB: in all directions together and in each one, shape (1 + 4, 3); NaN where
            nothing can be said.
    """

    noise: float
    shortfalls: Tensor


def measure_sharpness(image: Image.Image) -> Sharpness:
    """Measure an image.

    Args:
        image: of any mode that has a luminance.
    """
    levels = []
    grey = without_borders(image.convert("L"))
    for number in range(_SIZES):
        if number:
            grey = grey.resize((max(1, grey.width // 2), max(1, grey.height // 2)), Image.Resampling.LANCZOS)
        tiles = _tiles(torch.from_numpy(np.array(grey)).float())
        if len(tiles) < _LEAST_TILES:
            break
        levels.append(_level(tiles))
    if len(levels) < _LEAST_SIZES:
        return Sharpness(None, False, 0.0, 0.0, None)
    return _conclude(levels)


def _tiles(plane: Tensor) -> Tensor:
    """Tiles of a plane of shape (H, W), shape (n, 32, 32)."""
    step = max(_TILE // 2, int(math.sqrt(plane.numel() / _MOST_TILES)))
    if min(plane.shape) < _TILE:
        return plane.new_empty(0, _TILE, _TILE)
    return plane.unfold(0, _TILE, step).unfold(1, _TILE, step).flatten(0, 1)


def _level(tiles: Tensor) -> _Level:
    window, rings, squares = _operators()
    spectrum = torch.fft.rfft2((tiles - tiles.mean(dim=(1, 2), keepdim=True)) * window, norm="ortho")
    power = torch.view_as_real(spectrum).square().sum(dim=-1)
    in_rings = torch.einsum("nyx,rdyx->nrd", power, rings)
    together = in_rings.mean(dim=2)
    middle = tiles.mean(dim=(1, 2))
    lit = (middle > _DARKEST) & (middle < _BRIGHTEST)
    noise = _noise(together[lit] if 2 * lit.sum() >= len(tiles) else together)
    contrast = together[:, 1] > _CONTRAST
    grows = together[contrast, 0] < together[contrast, 1]
    nothing = torch.full((1 + _DIRECTIONS, len(_RINGS) - 1 - _FITTED), math.nan)
    if noise > _MOST_NOISE**2 or (len(grows) and float(grows.float().mean()) > _MOST_WITHOUT_LAW):
        return _Level(math.sqrt(noise), nothing)
    # What one frequency has, in 3×3 bins, which is as far as the window spreads it.
    weighted = power * squares
    highest = 9 * torch.nn.functional.avg_pool2d(weighted[:, None], 3, 1, 1)[:, 0].amax(dim=(1, 2))
    in_rings = in_rings[highest < _TONE * weighted.sum(dim=(1, 2))]
    parts = [in_rings.mean(dim=2), *in_rings.unbind(dim=2)]
    return _Level(math.sqrt(noise), torch.stack([_sharpest(_shortfalls(part, noise)) for part in parts]))


@lru_cache(maxsize=1)
def _operators() -> tuple[Tensor, Tensor, Tensor]:
    """A window, shape (32, 32); means over the rings and directions of a half spectrum; f^2 where it counts."""
    window = torch.outer(*[torch.hann_window(_TILE, periodic=False)] * 2)
    window /= window.square().mean().sqrt()
    y, x = torch.fft.fftfreq(_TILE)[:, None], torch.fft.rfftfreq(_TILE)
    frequency = torch.hypot(y, x)
    direction = (torch.atan2(y.expand_as(frequency), x.expand_as(frequency)) / math.pi * _DIRECTIONS).round()
    direction = direction.long() % _DIRECTIONS
    # In a half spectrum, columns in between stand for two.
    times = torch.full_like(frequency, 2.0)
    times[:, [0, -1]] = 1.0
    rings = []
    for low, high in pairwise(_RINGS):
        ring = (frequency >= low) & (frequency < high)
        rings.append(torch.stack([times * (ring & (direction == each)) for each in range(_DIRECTIONS)]))
    means = torch.stack(rings)
    means /= means.sum(dim=(2, 3), keepdim=True)
    counted = (frequency >= _RINGS[0]) & (frequency <= _RINGS[-1])
    return window, means, times * counted * frequency.square()


def _noise(power: Tensor) -> float:
    """The power of noise, by that of the quietest tiles, shape (n, 5): less a texture that falls as fast as f^-2."""
    quietest = power[power[:, _FITTED:].mean(dim=1).argsort()[: max(2, len(power) // 20)]].mean(dim=0)
    falls = (_CENTERS[-1] / _CENTERS[_FITTED]) ** 2
    texture = max(0.0, float(quietest[_FITTED] - quietest[-1])) / (falls - 1)
    return max(_LEAST_NOISE, float(quietest[-1]) - texture)


def _shortfalls(power: Tensor, noise: float) -> Tensor:
    """In dB, of tiles with this power in the rings, shape (n, 5); shape (n, 3), NaN where they say nothing."""
    centers = torch.tensor(_CENTERS).log()
    logs = (power - _SURE_NOISE * noise).clamp(min=0.02 * noise).log()
    exponent = (logs[:, 0] - logs[:, 1]) / (centers[1] - centers[0])
    exponent = exponent.clamp(_LEAST_EXPONENT, _STEEPEST)
    law = logs[:, 1:2] - exponent[:, None] * (centers[_FITTED:] - centers[1])
    decibels = 10 / math.log(10) * (logs[:, _FITTED:] - law)
    says = (law.exp() > _LEAST_SIGNAL * noise) & (power[:, 1:2] > 2 * noise)
    return torch.where(says, decibels.clamp(min=_LEAST_SHORTFALL), math.nan)


def _sharpest(shortfalls: Tensor) -> Tensor:
    """Those of the sharpest tiles, shape (3,)."""
    found = torch.full(shortfalls.shape[1:], math.nan)
    for ring, values in enumerate(shortfalls.T):
        values = values[~values.isnan()].sort(descending=True).values
        if len(values) >= _LEAST_SAYING:
            found[ring] = values[max(2, round(_SHARPEST * len(values))) - 1]
    return found


def _conclude(levels: list[_Level]) -> Sharpness:
    ways = torch.stack([level.shortfalls for level in levels]).unbind(dim=1)
    noise = levels[0].noise if levels[0].noise > math.sqrt(_LEAST_NOISE) else 0.0
    found = _end_of_detail(ways[0], _MISSING)
    if found is None:
        return Sharpness(None, False, 0.0, 0.0, noise)
    resolution = _resolution(found.frequency)
    if resolution >= WORST_GOOD and not ways[0][0, -1] > _MOST_EXCESS:
        ends = [(_end_of_detail(way, _MISSING_IN_ONE), way) for way in ways[1:]]
        moved = [_first_missing(way) for end, way in ends if end and end.frequency < _MOTION * found.frequency]
        least = min(moved, default=found)
        part = _resolution(least.frequency)
        if part < min(_WORST_OF_ONE, resolution):
            return Sharpness(math.sqrt(part * resolution), True, least.shortfall, least.begins, noise)
    return Sharpness(resolution, False, found.shortfall, found.begins, noise)


class _End(NamedTuple):
    """The frequency at which detail ends, and the shortfall of the first ring that is not there and where it begins."""

    frequency: float
    shortfall: float = 0.0
    begins: float = 0.0


def _end_of_detail(levels: Tensor, missing: float) -> _End | None:
    """By the largest size whose lowest ring is there; 0.5 where nothing is missing, None where that is not known.

    Args:
        levels: shortfalls of the three rings at each size, the largest first, shape (sizes, 3).
        missing: from which shortfall on a ring is not there.
    """
    missed: _End | None = None
    for number, level in enumerate(levels):
        seen = level[~level.isnan()]
        if not len(seen):
            continue
        after = levels[number + 1, 1:] if number + 1 < len(levels) else seen[:0]
        after = after[~after.isnan()]
        if seen[0] >= missing and not (after < missing - _CONFIRMED).any():
            end = _end_at(level, missing, number)
            if end is None and number and missed is not None:  # everything is there at this size, and nothing above it
                end = missed._replace(frequency=_RINGS[-1] / 2**number)
            return end or _End(_RINGS[-1])
        missed = _End(_CENTERS[_FITTED] / _STEP / 2**number, float(seen[0]), _RINGS[_FITTED] / 2**number)
    return missed


def _first_missing(levels: Tensor) -> _End:
    """Where detail of one direction is missing first, by the smallest size that shows it: motion leaves some above."""
    for number, level in reversed(list(enumerate(levels))):
        end = _end_at(level, _MISSING_IN_ONE, number)
        if end is not None:
            return end
    return _End(_RINGS[-1])


def _end_at(level: Tensor, missing: float, number: int) -> _End | None:
    """Where the shortfall falls below ``missing`` at one size, between the middles of two rings; None for nowhere.

    Args:
        level: shortfalls of the three rings.
        missing: see above.
        number: of the size: 0, and one more each time the image is halved.
    """
    before, value_before = math.log(_CENTERS[_FITTED] / _STEP), 0.0
    for ring, value in enumerate(map(float, level), _FITTED):
        if math.isnan(value):
            continue
        center = math.log(_CENTERS[ring])
        if value < missing:
            part = (missing - value_before) / (value - value_before) if value < value_before else 0.0
            frequency = math.exp(before + max(part, 0.0) * (center - before))
            return _End(frequency / 2**number, value, _RINGS[ring] / 2**number)
        before, value_before = center, value
    return None


def _resolution(frequency: float) -> float:
    return 1.0 if frequency >= _RINGS[-1] else min(1.0, _CUTOFF_OF_ENLARGING * frequency)
