"""A defect of an image, and how it is made on a good one."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# The least side to which an image is reduced to lose its detail.
_LEAST_SIDE = 2


@dataclass(frozen=True)
class Defect:
    """What is missing or wrong in an image, at the size at which it is trained.

    Attributes:
        resolution: the fraction of the pixels along each side that its detail would need: 0.25 where it was enlarged
            fourfold, or blurred as much.
        jpeg: the quality with which it was compressed, 1..100; None for none that matters.
        jpeg_scale: its size then, as a multiple of that at which it is trained.
        noise: standard deviation of its noise in each channel, on the scale 0..255.
    """

    resolution: float = 1.0
    jpeg: int | None = None
    jpeg_scale: float = 1.0
    noise: float = 0.0

    def __bool__(self) -> bool:
        return self.resolution < 1 or self.jpeg is not None or self.noise > 0

    def __str__(self) -> str:
        parts = [f"{self.resolution:.0%} of the resolution"] if self.resolution < 1 else []
        parts += [f"JPEG quality {self.jpeg}"] if self.jpeg is not None else []
        parts += [f"noise {self.noise:.0f}"] if self.noise else []
        return ", ".join(parts) or "full quality"

    def is_at_most(self, other: Defect) -> bool:
        """Whether this is in no way worse than ``other``."""
        jpeg, jpeg_other = (101 if one.jpeg is None else one.jpeg for one in (self, other))
        is_larger = self.jpeg is None or self.jpeg_scale >= other.jpeg_scale
        return self.resolution >= other.resolution and jpeg >= jpeg_other and is_larger and self.noise <= other.noise

    def apply(self, image: Image.Image, seed: int = 0) -> Image.Image:
        """A good RGB image with this defect: reduced and enlarged again, then compressed, then noisy.

        Args:
            image: the image, at the size at which it is trained.
            seed: of the noise.
        """
        size = image.size
        if self.resolution < 1:
            image = _resized(image, self.resolution, Image.Resampling.LANCZOS).resize(size, Image.Resampling.BICUBIC)
        if self.jpeg is not None:
            buffer = io.BytesIO()
            _resized(image, self.jpeg_scale, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=self.jpeg)
            with Image.open(buffer) as compressed:
                image = compressed.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        if self.noise:
            values = np.asarray(image, dtype=np.float32)
            values = values + self.noise * np.random.default_rng(seed).standard_normal(values.shape, dtype=np.float32)
            image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
        return image


def _resized(image: Image.Image, factor: float, method: Any) -> Image.Image:
    if factor == 1:
        return image
    return image.resize([max(_LEAST_SIDE, round(side * factor)) for side in image.size], method)
