"""Reads off a picture what `pictures` drew into it, by direct measurement: no model, nothing learned.

The instruments look at what was drawn, in the order in which it can be told: the colourful pixels are the shape; their
mean is its colour, their centre of mass its position, their outline its kind; the other pixels are the background,
whose mean is its brightness and whose strongest wave its texture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .pictures import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, TEXTURE_AMPLITUDE, Picture, coverage

# Backgrounds are grey; the least colourful shape has a saturation of 0.5.
_COLOURFUL = 0.25
# Fewer colourful pixels than this share of the picture are noise, not a shape; the smallest shape covers 3%.
_SMALLEST_SHAPE = 0.01
# A wave of less than this share of the drawn amplitude counts as no pattern.
_FAINTEST_WAVE = 0.4


def measure(picture: Picture) -> dict[str, str]:
    """The five captioned attributes of a picture, each as the nearest of its possible values.

    Args:
        picture: shape (H, W, 3), 0 to 1.

    Returns:
        ``shape``, ``colour``, ``position``, ``background`` and ``texture``, in the words of `pictures.Scene`. The first
        three are ``"none"`` where nothing in the picture is colourful.
    """
    saturation = picture.max(axis=-1) - picture.min(axis=-1)
    inside = saturation > _COLOURFUL
    found = {"shape": "none", "colour": "none", "position": "none"}
    if inside.mean() >= _SMALLEST_SHAPE:
        centre = _centre_of_mass(inside)
        found = {
            "shape": _nearest_shape(inside, centre),
            "colour": _nearest(picture[inside].mean(axis=0), COLOURS),
            "position": _nearest(np.array(centre), POSITIONS),
        }
    # The rim of the shape is a blend of both; it belongs to neither.
    outside = saturation < 0.5 * _COLOURFUL
    brightness = picture.mean(axis=-1)
    if not outside.any():
        return found | {"background": "none", "texture": "none"}
    level = np.array([brightness[outside].mean()])
    background = _nearest(level, {name: (value,) for name, value in BACKGROUNDS.items()})
    return found | {"background": background, "texture": _strongest_wave((brightness - level) * outside, outside)}


def _nearest(value: NDArray, options: Mapping[str, tuple[float, ...]]) -> str:
    return min(options, key=lambda name: float(np.linalg.norm(value - np.array(options[name]))))


def _centre_of_mass(inside: NDArray) -> tuple[float, float]:
    """(down, right) as fractions of the sides."""
    down, right = np.nonzero(inside)
    return (float(down.mean()) + 0.5) / inside.shape[0], (float(right.mean()) + 0.5) / inside.shape[1]


def _nearest_shape(inside: NDArray, centre: tuple[float, float]) -> str:
    """The shape whose outline, at the same centre of mass and with the same area, overlaps best."""
    size = inside.shape[0]

    def overlap(shape: str) -> float:
        unit = coverage(shape, (0.5, 0.5), 0.2, size) > 0.5
        radius = 0.2 * math.sqrt(inside.sum() / unit.sum())
        offset = (
            np.array(_centre_of_mass(unit)) - 0.5
        )  # a triangle's centre of mass is not the point it is drawn around
        at = (centre[0] - offset[0] * radius / 0.2, centre[1] - offset[1] * radius / 0.2)
        drawn = coverage(shape, at, radius, size) > 0.5
        return float((drawn & inside).sum() / (drawn | inside).sum())

    return max(SHAPES, key=overlap)


def _strongest_wave(residual: NDArray, weight: NDArray) -> str:
    """The texture whose wave is strongest, over all periods and phases; ``no pattern`` below a threshold."""
    size = residual.shape[0]
    # Zero-padding samples the spectrum at quarters of a bin, fine enough for any period.
    spectrum = np.abs(np.fft.rfft2(residual, s=(4 * size, 4 * size))) * 2 / weight.sum()
    rows = np.abs(np.fft.fftfreq(4 * size))[:, None]
    columns = np.fft.rfftfreq(4 * size)[None, :]
    frequency = np.hypot(rows, columns)
    angle = np.degrees(np.arctan2(rows, columns))
    textured = (frequency > 1 / 28) & (frequency < 1 / 9)
    peak = np.unravel_index(np.argmax(np.where(textured, spectrum, 0)), spectrum.shape)
    # Checks are a product of two waves: half the amplitude on each of the two diagonals, and shorter by sqrt(2).
    if spectrum[peak] < 0.5 * _FAINTEST_WAVE * TEXTURE_AMPLITUDE:
        return "no pattern"
    if angle[peak] > 67.5:
        return "horizontal stripes"
    if angle[peak] < 22.5:
        return "vertical stripes"
    mirrored = (-peak[0]) % spectrum.shape[0], peak[1]
    both = spectrum[mirrored] > 0.5 * spectrum[peak]
    return "checks" if both else "diagonal stripes"
