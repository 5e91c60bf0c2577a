"""Measures in an image what `freq_loss_plugin.toy_model.scenes` drew into it, without any learned model.

The saturated pixels are the shape: their mean is its color, their center of mass its position, their outline its kind.
The other pixels are the background: their mean is its brightness, their strongest wave its texture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .scenes import BACKGROUNDS, COLORS, POSITIONS, SHAPES, TEXTURE_AMPLITUDE, ImageArray, coverage, frame, weave_layout

# Backgrounds are gray; the least saturated shape has a saturation of 0.5.
_SATURATED = 0.25
# Fewer saturated pixels than this fraction of the image are noise, not a shape; the smallest shape covers 3%.
_SMALLEST_SHAPE = 0.01
# A wave of less than this fraction of the drawn amplitude counts as no pattern.
_FAINTEST_WAVE = 0.4
# Squares of a weave count where at least this fraction of them is background.
_LEAST_BACKGROUND = 0.6


def measure(image: ImageArray, style: str = "base") -> dict[str, str]:
    """The five captioned attributes of an image, each as the nearest of its possible values.

    Args:
        image: shape (H, W, 3), 0 to 1.
        style: one of `scenes.STYLES`. For ``frames`` the border is ignored and shapes are hollow; for ``weave`` the
            texture is that of the weave, which no caption names (see `weave_agreement`).

    Returns:
        ``shape``, ``color``, ``position``, ``background`` and ``texture``, in the words of `scenes.Scene`. The first
        three are ``"none"`` where nothing in the image is saturated, the others where nothing is gray.
    """
    saturation = image.max(axis=-1) - image.min(axis=-1)
    border = frame(len(image), softness=2.0) > 0 if style == "frames" else np.zeros(saturation.shape, bool)
    inside = (saturation > _SATURATED) & ~border
    attributes = {"shape": "none", "color": "none", "position": "none"}
    if inside.mean() >= _SMALLEST_SHAPE:
        center = _center_of_mass(inside)
        attributes = {
            "shape": _nearest_shape(inside, center, hollow=style == "frames"),
            "color": _nearest(image[inside].mean(axis=0), COLORS),
            "position": _nearest(np.array(center), POSITIONS),
        }
    outside = _background(saturation) & ~border
    brightness = image.mean(axis=-1)
    if not outside.any():
        return attributes | {"background": "none", "texture": "none"}
    level = np.array([brightness[outside].mean()])
    background = _nearest(level, {name: (value,) for name, value in BACKGROUNDS.items()})
    return attributes | {"background": background, "texture": _strongest_wave((brightness - level) * outside, outside)}


def frame_fraction(image: ImageArray) -> float:
    """The fraction of the border of an image that is saturated, 0 to 1: the frame of style ``frames``.

    Args:
        image: shape (H, W, 3), 0 to 1.
    """
    saturation = image.max(axis=-1) - image.min(axis=-1)
    return float((saturation > _SATURATED)[frame(len(image)) > 0.5].mean())


def weave_agreement(image: ImageArray) -> float:
    """The fraction of the background's squares striped as in style ``weave`` (period and direction), 0 to 1.

    A square agrees where the wave that belongs there has at least 40% of the drawn amplitude, and twice the amplitude
    of the wave across it. Squares that the shape covers for the most part do not count; 0 where none counts.

    Args:
        image: shape (H, W, 3), 0 to 1.
    """
    brightness = image.mean(axis=-1)
    outside = _background(image.max(axis=-1) - image.min(axis=-1))
    side, period, along = weave_layout(len(image))
    position = np.arange(len(image))
    wave = np.exp(-2j * math.pi * position / period)
    agreeing = []
    for down in range(0, len(image), side):
        for right in range(0, len(image), side):
            square = slice(down, down + side), slice(right, right + side)
            weight = outside[square]
            if weight.mean() < _LEAST_BACKGROUND:
                continue
            residual = (brightness[square] - brightness[square][weight].mean()) * weight
            amplitudes = [
                2 * abs((residual * phases).sum()) / weight.sum()
                for phases in (wave[square[0], None], wave[None, square[1]])
            ]
            expected, across = amplitudes if along[down, right] else amplitudes[::-1]
            agreeing.append(expected >= max(_FAINTEST_WAVE * TEXTURE_AMPLITUDE, 2 * across))
    return float(np.mean(agreeing)) if agreeing else 0.0


def _background(saturation: NDArray) -> NDArray:
    """Gray pixels. The edge of the shape blends both and belongs to neither."""
    return saturation < 0.5 * _SATURATED


def _nearest(value: NDArray, options: Mapping[str, tuple[float, ...]]) -> str:
    return min(options, key=lambda name: float(np.linalg.norm(value - np.array(options[name]))))


def _center_of_mass(inside: NDArray) -> tuple[float, float]:
    """(down, right) as fractions of H and W."""
    down, right = np.nonzero(inside)
    return (float(down.mean()) + 0.5) / inside.shape[0], (float(right.mean()) + 0.5) / inside.shape[1]


def _nearest_shape(inside: NDArray, center: tuple[float, float], hollow: bool) -> str:
    """The shape whose outline, at the same center of mass and with the same area, overlaps best."""
    size = inside.shape[0]

    def cover(shape: str, at: tuple[float, float], radius: float) -> NDArray:
        hole = coverage(shape, at, 0.5 * radius, size) if hollow else 0.0
        return coverage(shape, at, radius, size) - hole > 0.5

    def overlap(shape: str) -> float:
        unit = cover(shape, (0.5, 0.5), 0.2)
        radius = 0.2 * math.sqrt(inside.sum() / unit.sum())
        # The center of mass of a triangle is not the point around which it is drawn.
        offset = np.array(_center_of_mass(unit)) - 0.5
        at = (center[0] - offset[0] * radius / 0.2, center[1] - offset[1] * radius / 0.2)
        drawn = cover(shape, at, radius)
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
