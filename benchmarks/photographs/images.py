"""Styles and defects of images. Both are made with Pillow and NumPy alone, and not by what the plug-in repairs with."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from freq_loss_plugin.image_quality.defects import Defect

NEGATIVE, HALFTONE = "negative", "halftone"
# Pixels from dot to dot, the width of a dot's border, and the angle of each color's screen.
_PERIOD, _BORDER, _ANGLES = 7.0, 0.15, (15.0, 75.0, 45.0)
_GRID = 8

# What the plug-in is told: for a blur of sigma 2, the resolution whose frequency it takes to half of its amplitude,
# 0.19, lies nearest to a quarter among those that are tried here.
NOMINAL = {
    "half": Defect(resolution=0.5),
    "quarter": Defect(resolution=0.25),
    "JPEG 40": Defect(jpeg=40),
    "JPEG 10": Defect(jpeg=10),
    "noise 20": Defect(noise=20.0),
    "blur": Defect(resolution=0.25),
}
MIXTURE = "mixture"
DEFECTS = (*NOMINAL, MIXTURE)
# Of arms that train on sharp images only.
NO_DEFECT = "none"


def negative(image: Image.Image, _numbers: np.random.Generator) -> Image.Image:
    """255 - x: what changes is coarse."""
    return ImageOps.invert(image)


def halftone(image: Image.Image, numbers: np.random.Generator) -> Image.Image:
    """Dots `_PERIOD` pixels apart, for each color on a rotated grid: what changes is fine.

    Args:
        image: an RGB image.
        numbers: where the grids begin.
    """
    values = np.asarray(image.filter(ImageFilter.BoxBlur(_PERIOD / 4)), dtype=np.float64) / 255
    rows, columns = np.mgrid[: image.height, : image.width]
    printed = []
    for channel, angle in enumerate(np.deg2rad(_ANGLES)):
        shift = numbers.uniform(0, 2 * np.pi, 2)
        along = (columns * np.cos(angle) + rows * np.sin(angle)) * 2 * np.pi / _PERIOD + shift[0]
        across = (rows * np.cos(angle) - columns * np.sin(angle)) * 2 * np.pi / _PERIOD + shift[1]
        screen = (np.cos(along) + np.cos(across) + 2) / 4
        printed.append(((values[..., channel] - screen) / _BORDER + 0.5).clip(0, 1))
    return Image.fromarray((np.stack(printed, axis=2) * 255).round().astype(np.uint8))


STYLES: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {NEGATIVE: negative, HALFTONE: halftone}


def kind_of(defect: str, number: int) -> str:
    """The defect of image ``number``: those of a mixture take turns."""
    return list(NOMINAL)[number % len(NOMINAL)] if defect == MIXTURE else defect


def damaged(image: Image.Image, kind: str, numbers: np.random.Generator) -> Image.Image:
    """An image with a defect, a key of `NOMINAL`.

    Args:
        image: an RGB image.
        kind: the defect.
        numbers: of the noise, and where the blocks of JPEG begin: people crop.
    """
    if kind.startswith("JPEG"):
        return _compressed(image, int(kind.split()[1]), numbers)
    if kind == "noise 20":
        values = np.asarray(image) + 20.0 * numbers.standard_normal((image.height, image.width, 3))
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(2.0))
    times = {"half": 2, "quarter": 4}[kind]
    return image.reduce(times).resize(image.size, Image.Resampling.BICUBIC)


def _compressed(image: Image.Image, quality: int, numbers: np.random.Generator) -> Image.Image:
    left, top = (int(number) for number in numbers.integers(_GRID, size=2))
    border = ((top, _GRID), (left, _GRID), (0, 0))
    buffer = io.BytesIO()
    Image.fromarray(np.pad(np.asarray(image), border, mode="edge")).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB").crop((left, top, left + image.width, top + image.height))
