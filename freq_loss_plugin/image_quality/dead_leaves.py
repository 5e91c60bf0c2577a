r"""Synthetic reference images with the statistics of photographs: disks and rectangles that hide each other.

Sizes r are distributed as r^-3, which makes such images look alike at all scales, as photographs do; colors are random,
and each shape has a texture whose spectrum is a power law.

Source: A. B. Lee, D. Mumford and J. Huang (2001), Occlusion models for natural images; that restoration learned from
such images works on photographs: R. Achddou, Y. Gousseau and S. Ladjal (2021), Synthetic images as a regularity prior
for image restoration neural networks.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

# Drawn at twice the size, so that edges are smooth.
_OVERSAMPLING = 2
# Radii in pixels, and as a fraction of the side; the amplitude of a texture; and its spectrum, 1/f in amplitude.
_SMALLEST, _LARGEST = 2.0, 1 / 3
_TEXTURE, _EXPONENT = 0.06, 1.0
# So much more area is painted than there is: hardly anything of the canvas is left.
_COVERAGE = 4.0


def draw(side: int, seed: int) -> Image.Image:
    """One image.

    Args:
        side: width and height.
        seed: of everything in it.
    """
    numbers = np.random.default_rng((81, seed))
    large = side * _OVERSAMPLING
    colors, amplitudes = Image.new("RGB", (large, large)), Image.new("L", (large, large))
    pens = ImageDraw.Draw(colors), ImageDraw.Draw(amplitudes)
    for radius in _radii(large, numbers):
        corners = _shape(radius, large, numbers)
        color = numbers.uniform(0, 255) + numbers.uniform(-1, 1, 3) * numbers.uniform(0, 128)
        fills = tuple(map(int, color.clip(0, 255))), (int(255 * min(1, numbers.exponential(_TEXTURE))),)
        for pen, fill in zip(pens, fills, strict=True):
            (pen.ellipse if len(corners) == 2 else pen.polygon)(corners, fill=fill)
    textured = np.asarray(colors) + np.asarray(amplitudes)[..., None] * _noise(large, numbers)[..., None]
    image = Image.fromarray(textured.round().clip(0, 255).astype(np.uint8))
    return image.resize((side, side), Image.Resampling.LANCZOS)


def _radii(side: int, numbers: np.random.Generator) -> np.ndarray:
    """Shuffled; as many as cover the canvas `_COVERAGE` times."""
    smallest, largest = _SMALLEST * _OVERSAMPLING, _LARGEST * side
    mean_area = 2 * math.pi * math.log(largest / smallest) / (smallest**-2 - largest**-2)
    count = int(_COVERAGE * side**2 / mean_area)
    uniform = numbers.random(count)
    return (smallest**-2 + uniform * (largest**-2 - smallest**-2)) ** -0.5


def _shape(radius: float, side: int, numbers: np.random.Generator) -> list[tuple[float, float]]:
    """The corners of a disk's box, two of them, or of a turned rectangle, four."""
    center = numbers.uniform(-radius, side + radius, 2)
    if numbers.random() < 0.5:
        return [tuple(center - radius), tuple(center + radius)]
    angle, ratio = numbers.uniform(0, math.pi), numbers.uniform(0.2, 1)
    along = radius * np.array([math.cos(angle), math.sin(angle)])
    across = ratio * np.array([-along[1], along[0]])
    turned = (along + across, along - across, -along - across, across - along)
    return [tuple(center + corner / math.sqrt(2)) for corner in turned]


def _noise(side: int, numbers: np.random.Generator) -> np.ndarray:
    """A texture of variance 1, shape (side, side)."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(numbers.standard_normal((side, side))) / frequency**_EXPONENT
    noise = np.fft.irfft2(spectrum, s=(side, side))
    return noise / noise.std()
