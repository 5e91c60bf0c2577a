r"""How blurred an image is at its sharpest edges.

A step blurred by a Gaussian of standard deviation sigma has, after another of standard deviation s, the gradient

.. math:: g(s) = \frac{A}{\sqrt{2\pi(\sigma^2 + s^2)}}, \qquad
          \sigma^2 = \frac{b^2 - R^2 a^2}{R^2 - 1}, \quad R = \frac{g(a)}{g(b)}

at its edge, so two scales a < b give sigma, and further scales tell whether it is a step at all: a thin line, a
ripple or the edge of a texture loses its gradient faster. An image that is in focus anywhere has sharp edges there; an
image that was enlarged or blurred has none.

Source: S. Zhuo, T. Sim (2011), Defocus map estimation from a single image, Pattern Recognition 44.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .pixels import as_floats

# The scales in pixels, and at every which pixel the gradient of that scale is taken.
_SCALES = {0.8: 1, 1.6: 1, 3.2: 2, 6.4: 4}
# By how much the gradients at the two coarse scales may differ from those of a step. The last one looks 13 pixels far,
# and is asked only of edges that seem blurred: these must prove that they are edges.
_STEP_TOLERANCES = 0.12, 0.3
# The least step height, of a range of 1.
_LEAST_HEIGHT = 0.1
# A step of that height and a blur of eight pixels has this gradient, at the scale at which edges are looked for.
_LEAST_GRADIENT = 0.005
# What counts as sharp, in pixels: an image that was reduced well has 0.3 to 0.9 at its best edges, photographs
# included; one enlarged twofold has 0.8 to 1.2.
SHARP = 1.0
# Fewer edges than this say nothing.
_LEAST_EDGES = 20
# An image is sharp if this fraction of its edges is, and no fewer than half of ``_LEAST_EDGES``.
_SHARP_FRACTION = 0.03
# The blur of an image that is not: this quantile of its edges' (the softer ones were out of focus before), at most so
# many times that of the sharpest.
_QUANTILE, _MOST_SPREAD = 0.1, 1.35
# Images are judged by those of their tiles that have most contrast.
_TILE, _MOST_TILES = 128, 10
# Where pixels are repeated, at most this fraction of columns differs from those before. Pixel art has at most so many
# colors, or larger pixels than this.
_MOST_CHANGES, _FEW_COLORS, _MOST_REPEATED, _LEAST_RUNS = 0.6, 256, 8, 12
# Pixels at the border of a tile where no edge is looked for.
_BORDER = 6


def edge_blur(pixels: Tensor, *, ignore_grid: bool = False) -> float | None:
    """Standard deviation of the blur at the sharpest edges.

    Args:
        pixels: shape (3, H, W), bytes or 0..1.
        ignore_grid: leave out edges along the borders of 8×8 blocks, which JPEG makes.

    Returns:
        In pixels, see `SHARP`; None where there are too few edges.
    """
    blurs = _blurs(*_busiest_tiles(pixels), ignore_grid=ignore_grid).sort().values
    if len(blurs) < _LEAST_EDGES:
        return None
    sharpest = float(blurs[max(_LEAST_EDGES // 2, int(_SHARP_FRACTION * len(blurs)))])
    if sharpest <= SHARP:
        return sharpest
    return min(float(torch.quantile(blurs, _QUANTILE)), _MOST_SPREAD * sharpest)


def repeated(pixels: Tensor) -> float:
    """How often each pixel is repeated along both sides, as enlarging without interpolation does; 1 where they are not.

    Pixel art is not meant: images of few colors have 1.

    Args:
        pixels: shape (3, H, W), bytes.
    """
    columns = (pixels[:, :, 1:] != pixels[:, :, :-1]).any(dim=0).any(dim=0)
    if float(columns.float().mean()) > _MOST_CHANGES:
        return 1.0
    rows = (pixels[:, 1:] != pixels[:, :-1]).any(dim=0).any(dim=1)
    times = min(_mean_run(columns), _mean_run(rows))
    codes = pixels[:, ::3, ::3].flatten(1).int().T @ torch.tensor([65536, 256, 1], dtype=torch.int32)
    return times if times <= _MOST_REPEATED and len(codes.unique()) > _FEW_COLORS else 1.0


def _mean_run(changes: Tensor) -> float:
    """The mean length of runs without a change, where all of them are as long, give or take one; 1 where they are not.

    Args:
        changes: whether anything differs from the column (or row) before, shape (n,).
    """
    places = changes.nonzero()[:, 0]
    if len(places) < _LEAST_RUNS:
        return 1.0
    runs = places[1:] - places[:-1]
    return float(runs.float().mean()) if int(runs.max() - runs.min()) <= 1 else 1.0


def _busiest_tiles(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles, shape (N, C, h, w), and the row and column of their first pixels, shape (N, 2)."""
    height, width = min(_TILE, pixels.shape[1]), min(_TILE, pixels.shape[2])
    places = [(row, column) for row in _starts(pixels.shape[1], height) for column in _starts(pixels.shape[2], width)]
    if len(places) > _MOST_TILES:
        contrast = []
        for row in _starts(pixels.shape[1], height):
            green = as_floats(pixels[1, row : row + height])
            steps = (green[:, 1:] - green[:, :-1]).square().sum(dim=0)
            contrast += [float(steps[column : column + width].sum()) for column in _starts(pixels.shape[2], width)]
        ranked = sorted(zip(contrast, places, strict=True), reverse=True)
        places = [place for _, place in ranked[:_MOST_TILES]]
    tiles = torch.stack([pixels[:, row : row + height, column : column + width] for row, column in places])
    return as_floats(tiles), torch.tensor(places)


def _starts(length: int, tile: int) -> list[int]:
    """Where tiles begin that cover ``length``; the last two may overlap."""
    return sorted({*range(0, length - tile + 1, tile), length - tile})


def _blurs(tiles: Tensor, places: Tensor, *, ignore_grid: bool) -> Tensor:
    """sigma at every edge of the tiles, shape (n,); each color channel has edges of its own."""
    gradients = {scale: _gradient(tiles, scale) for scale in _SCALES}
    a, b, c, d = _SCALES
    edges = _peaks(*gradients[b])
    edges &= _inside(tiles.shape[-2:])
    if ignore_grid:
        edges &= _off_grid(places, tiles.shape[-2:])[:, None]
    tile, channel, row, column = edges.nonzero(as_tuple=True)

    def strength(scale: float) -> Tensor:
        n = _SCALES[scale]
        place = (tile, channel, row, column) if n == 1 else (tile, channel, row // n, column // n)
        return torch.hypot(*(axis[place] for axis in gradients[scale])).clamp(min=1e-9)

    fine, middle, coarse, coarsest = map(strength, _SCALES)
    ratio = (fine / middle).square()
    variance = (b**2 - ratio * a**2) / (ratio - 1).clamp(min=1e-3)

    def is_step(strength: Tensor, scale: float, before: Tensor, scale_before: float, tolerance: float) -> Tensor:
        expected = torch.sqrt((variance + scale_before**2) / (variance + scale**2))
        return (strength / before / expected - 1).abs() < tolerance

    near, far = _STEP_TOLERANCES
    height = middle * torch.sqrt(2 * math.pi * (variance + b**2))
    kept = (ratio > 1) & (variance > -0.1) & (height > _LEAST_HEIGHT) & is_step(coarse, c, middle, b, near)
    kept &= (variance <= SHARP**2) | is_step(coarsest, d, coarse, c, far)
    return variance[kept].clamp(min=0).sqrt()


def _gradient(tiles: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical derivative per pixel, smoothed by a Gaussian of ``scale`` pixels, at every n-th pixel."""
    rows, row_slopes = _operators(tiles.shape[-2], scale)
    columns, column_slopes = _operators(tiles.shape[-1], scale)
    return rows @ tiles @ column_slopes.T, row_slopes @ tiles @ columns.T


@lru_cache(maxsize=64)
def _operators(length: int, scale: float) -> tuple[Tensor, Tensor]:
    """A Gaussian and its derivative as matrices, shape (ceil(length / n), length); the border pixel goes on beyond it.

    Their rows give 1 for a constant and for a slope of 1. Row i is centred on the middle of pixels n·i to n·i + n - 1.
    """
    step = _SCALES[scale]
    reach = math.ceil(4 * scale) + step
    centres = torch.arange(0, length, step, dtype=torch.float64) + (step - 1) / 2
    places = torch.arange(-reach, length + reach, dtype=torch.float64)
    distances = places - centres[:, None]
    smooth = torch.exp(-(distances**2) / (2 * scale**2))
    slope = distances * smooth
    smooth /= smooth.sum(dim=1, keepdim=True)
    slope /= (slope * distances).sum(dim=1, keepdim=True)
    inside = places.clamp(0, length - 1).long().expand(len(centres), -1)
    empty = torch.zeros(len(centres), length, dtype=torch.float64)
    return empty.scatter_add(1, inside, smooth).float(), empty.scatter_add(1, inside, slope).float()


def _peaks(x: Tensor, y: Tensor) -> Tensor:
    """Where the gradient is largest along its own direction, to the nearest axis."""
    strength = torch.hypot(x, y)
    padded = F.pad(strength, (1, 1, 1, 1))
    middle = slice(1, -1)
    along_x = (strength >= padded[..., middle, :-2]) & (strength > padded[..., middle, 2:])
    along_y = (strength >= padded[..., :-2, middle]) & (strength > padded[..., 2:, middle])
    return torch.where(x.abs() >= y.abs(), along_x, along_y) & (strength > _LEAST_GRADIENT)


def _inside(size: torch.Size) -> Tensor:
    inside = torch.zeros(size, dtype=torch.bool)
    inside[_BORDER:-_BORDER, _BORDER:-_BORDER] = True
    return inside


def _off_grid(places: Tensor, size: torch.Size) -> Tensor:
    """Which pixels of the tiles are not next to a border of 8×8 blocks, shape (N, h, w)."""
    rows, columns = (
        (first[:, None] + torch.arange(side) + 1) % 8 > 1 for first, side in zip(places.T, size, strict=True)
    )
    return rows[:, :, None] & columns[:, None, :]
