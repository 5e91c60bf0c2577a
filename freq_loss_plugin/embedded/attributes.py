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

from .pictures import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, TEXTURE_AMPLITUDE, Picture, coverage, frame, weave_lies

# Backgrounds are grey; the least colourful shape has a saturation of 0.5.
_COLOURFUL = 0.25
# Fewer colourful pixels than this share of the picture are noise, not a shape; the smallest shape covers 3%.
_SMALLEST_SHAPE = 0.01
# A wave of less than this share of the drawn amplitude counts as no pattern.
_FAINTEST_WAVE = 0.4
# A weave is judged by its squares, each with at least this share of background.
_LEAST_BACKGROUND = 0.6


def measure(picture: Picture, style: str = "base") -> dict[str, str]:
    """The five captioned attributes of a picture, each as the nearest of its possible values.

    Args:
        picture: shape (H, W, 3), 0 to 1.
        style: one of `pictures.STYLES`. For ``frames`` the border is passed over and shapes are hollow; for ``weave``
            the texture is that of the weave, which is no caption's (see `weave_agreement`).

    Returns:
        ``shape``, ``colour``, ``position``, ``background`` and ``texture``, in the words of `pictures.Scene`. The first
        three are ``"none"`` where nothing in the picture is colourful.
    """
    saturation = picture.max(axis=-1) - picture.min(axis=-1)
    border = frame(len(picture), softness=2.0) > 0 if style == "frames" else np.zeros(saturation.shape, bool)
    inside = (saturation > _COLOURFUL) & ~border
    found = {"shape": "none", "colour": "none", "position": "none"}
    if inside.mean() >= _SMALLEST_SHAPE:
        centre = _centre_of_mass(inside)
        found = {
            "shape": _nearest_shape(inside, centre, hollow=style == "frames"),
            "colour": _nearest(picture[inside].mean(axis=0), COLOURS),
            "position": _nearest(np.array(centre), POSITIONS),
        }
    outside = _background(saturation) & ~border
    brightness = picture.mean(axis=-1)
    if not outside.any():
        return found | {"background": "none", "texture": "none"}
    level = np.array([brightness[outside].mean()])
    background = _nearest(level, {name: (value,) for name, value in BACKGROUNDS.items()})
    return found | {"background": background, "texture": _strongest_wave((brightness - level) * outside, outside)}


def frame_share(picture: Picture) -> float:
    """How much of the border of a picture is colourful, 0 to 1: the frame of style ``frames``."""
    saturation = picture.max(axis=-1) - picture.min(axis=-1)
    return float((saturation > _COLOURFUL)[frame(len(picture)) > 0.5].mean())


def weave_agreement(picture: Picture) -> float:
    """Which share of the squares of the background is striped as in style ``weave``: period and direction, 0 to 1.

    A square agrees where the wave that belongs there has at least 40% of the drawn amplitude and twice that of the wave
    across it. Squares with much of the shape in them do not count; without any other, this is 0.
    """
    brightness = picture.mean(axis=-1)
    outside = _background(picture.max(axis=-1) - picture.min(axis=-1))
    side, period, along = weave_lies(len(picture))
    position = np.arange(len(picture))
    wave = np.exp(-2j * math.pi * position / period)
    agreeing = []
    for down in range(0, len(picture), side):
        for right in range(0, len(picture), side):
            square = slice(down, down + side), slice(right, right + side)
            weight = outside[square]
            if weight.mean() < _LEAST_BACKGROUND:
                continue
            residual = (brightness[square] - brightness[square][weight].mean()) * weight
            amplitudes = [
                2 * abs((residual * phases).sum()) / weight.sum()
                for phases in (wave[square[0], None], wave[None, square[1]])
            ]
            right_one, other = amplitudes if along[down, right] else amplitudes[::-1]
            agreeing.append(right_one >= max(_FAINTEST_WAVE * TEXTURE_AMPLITUDE, 2 * other))
    return float(np.mean(agreeing)) if agreeing else 0.0


def _background(saturation: NDArray) -> NDArray:
    """Grey pixels. The rim of the shape is a blend of both; it belongs to neither."""
    return saturation < 0.5 * _COLOURFUL


def _nearest(value: NDArray, options: Mapping[str, tuple[float, ...]]) -> str:
    return min(options, key=lambda name: float(np.linalg.norm(value - np.array(options[name]))))


def _centre_of_mass(inside: NDArray) -> tuple[float, float]:
    """(down, right) as fractions of the sides."""
    down, right = np.nonzero(inside)
    return (float(down.mean()) + 0.5) / inside.shape[0], (float(right.mean()) + 0.5) / inside.shape[1]


def _nearest_shape(inside: NDArray, centre: tuple[float, float], hollow: bool) -> str:
    """The shape whose outline, at the same centre of mass and with the same area, overlaps best."""
    size = inside.shape[0]

    def cover(shape: str, at: tuple[float, float], radius: float) -> NDArray:
        hole = coverage(shape, at, 0.5 * radius, size) if hollow else 0.0
        return coverage(shape, at, radius, size) - hole > 0.5

    def overlap(shape: str) -> float:
        unit = cover(shape, (0.5, 0.5), 0.2)
        radius = 0.2 * math.sqrt(inside.sum() / unit.sum())
        offset = (
            np.array(_centre_of_mass(unit)) - 0.5
        )  # a triangle's centre of mass is not the point it is drawn around
        at = (centre[0] - offset[0] * radius / 0.2, centre[1] - offset[1] * radius / 0.2)
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
