"""One training image: its blur, its compression and its noise, at the size at which it is trained."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from .. import image_files
from .defects import Defect
from .edges import SHARP, edge_blur, repeated
from .jpeg import quality_of_pixels, quality_of_tables, resized_by
from .noise import estimate_noise
from .pixels import as_bytes, as_pixels
from .sharpness import WORST_GOOD, Sharpness, measure_sharpness
from .spectrum import fit_power_law

Size: TypeAlias = tuple[int, int]

# A good image, enlarged n times by the usual methods, has a blur of this times n at its edges.
_BLUR_OF_ENLARGING = 0.375
# JPEG of this quality or better, and noise up to this, are taken as good: they matter at the lowest noise levels only.
GOOD_JPEG, GOOD_NOISE = 70, 8.0
# JPEG of an image that is reduced more than this before training has lost its artifacts.
_MOST_REDUCED = 4.0
# Blocks of JPEG are looked for in a part of this size.
_MIDDLE = 1024
MOTION = "blurred by motion"
_SOFT = "soft by nature, its spectrum follows no power law: unknown, taken as good"
_GREY, _GREY_MODES = "grey: its noise is told by quiet places alone", ("L", "LA", "I", "F", "1", "I;16")
# Where colors differ by this many times the noise of the luminance, that is a pattern: a halftone.
_MOST_COLOR = 3.0
# A law is asked for up to this blur, as a fraction of the shorter side, and up to this exponent after motion.
_MOST_FITTED_BLUR, _STEEPEST_MOVED = 0.006, 4.5
# Sides below this tell nothing.
_LEAST_SIDE = 64
# What is reduced more than this is first halved, which is much faster.
_KEPT = 2
# All threads together hold images of so many pixels, at 9 bytes each.
_MOST_PIXELS = 48_000_000


@dataclass(frozen=True)
class Measurement:
    """What was found in one image.

    Attributes:
        size: width and height of the file, in pixels.
        trained: width and height to which the image is resized before it is cropped and trained.
        resolution: effective resolution, as a fraction of that of ``trained``; 1 where nothing is known against it.
        is_measured: whether everything that matters could be told.
        witness: what tells that detail is missing, and how much.
        jpeg: quality, 1..100; None where it is no JPEG, or cannot be told.
        noise: standard deviation, on the scale 0..255.
        notes: what the user should know, for instance that nothing could be measured.
    """

    size: Size
    trained: Size
    resolution: float = 1.0
    is_measured: bool = False
    witness: str = ""
    jpeg: int | None = None
    noise: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether enough could be measured to call the image good or bad; it trains everywhere if not."""
        return self.is_measured or bool(self.defect)

    @property
    def is_good(self) -> bool:
        """Whether it is known to be of full quality."""
        return self.is_known and not self.defect

    @property
    def blur(self) -> float:
        """Sigma, in pixels of ``trained``, of a blur that takes as much detail; 0 where none is missing."""
        return _BLUR_OF_ENLARGING / self.resolution if self.resolution < 1 else 0.0

    @property
    def defect(self) -> Defect:
        """What is wrong with the image, in steps that are coarse enough to be shared by many images."""
        scale = self.size[0] / self.trained[0]
        has_artifacts = self.jpeg is not None and self.jpeg < GOOD_JPEG and scale <= _MOST_REDUCED
        return Defect(
            resolution=1.0 if self.resolution >= 1 else _in_steps(self.resolution, 4),
            jpeg=max(5, 5 * round(self.jpeg / 5)) if has_artifacts and self.jpeg is not None else None,
            jpeg_scale=_in_steps(scale, 2) if has_artifacts else 1.0,
            noise=_in_steps(self.noise, 4) if self.noise > GOOD_NOISE else 0.0,
        )


def measure_file(file: Path, trained: Size | None = None) -> Measurement:
    """Measure an image file.

    Args:
        file: the image.
        trained: width and height to which it is resized before training; its own size where left out.

    Raises:
        OSError: it cannot be read.
    """
    with Image.open(file) as image:
        size, jpeg = image.size, quality_of_tables(getattr(image, "quantization", None) or {})
        if jpeg is not None and trained is not None:
            image.draft(None, (_KEPT * trained[0], _KEPT * trained[1]))
        with _ROOM.hold(image.width * image.height):
            notes = [*image_files.notes(image), *([_GREY] if image.mode in _GREY_MODES else [])]
            rgb = image if image.mode == "RGB" and not notes else image_files.as_rgb(image)
            found = measure_image(rgb, trained or size, jpeg, size)
    return replace(found, notes=(*notes, *found.notes))


def measure_image(
    image: Image.Image, trained: Size | None = None, jpeg: int | None = None, size: Size | None = None
) -> Measurement:
    """Measure an RGB image.

    Args:
        image: the image.
        trained: as for `measure_file`.
        jpeg: its quality, where its file tells.
        size: that of its file, where ``image`` was reduced already.
    """
    size = size or image.size
    trained = trained or size
    empty = Measurement(size, trained, jpeg=jpeg)
    extrema: Any = image.getextrema()
    if all(low == high for low, high in extrema):
        return replace(empty, notes=("one color: nothing to measure, taken as good",))
    reduction = min(size[0] / trained[0], size[1] / trained[1])
    bound = reduction if reduction < WORST_GOOD else 1.0
    if min(size) < _LEAST_SIDE:
        note = f"{size[0]}×{size[1]} pixels are too few to measure"
        return replace(empty, resolution=bound, notes=(note if bound < 1 else f"{note}, taken as good",))
    middle, factor = _middle(image), None
    # Reduced pixels tell nothing of blocks, and images that are reduced much have lost them.
    if image.size == size and size[0] <= _MOST_REDUCED * trained[0]:
        of_pixels = quality_of_pixels(as_pixels(middle))
        jpeg = min((quality for quality in (jpeg, of_pixels) if quality is not None), default=None)
        factor = resized_by(as_pixels(middle)) if of_pixels is None else None
    resized = [] if factor is None else [f"resized by {factor:.2f} after JPEG, of which the quality is not known"]
    if trained != image.size:
        image = image.resize(trained, Image.Resampling.LANCZOS, reducing_gap=_KEPT)
    pixels = as_bytes(image)
    by_spectrum = measure_sharpness(image)
    sharpness = _sharpness(by_spectrum, pixels, is_jpeg=jpeg is not None and jpeg < GOOD_JPEG)
    noise = _noise(by_spectrum.noise, estimate_noise(pixels))
    if bound < sharpness.resolution:
        sharpness = _Sharpness(bound, True, f"enlarged {1 / bound:.1f} times for training", ())
    is_measured, notes = sharpness.is_known and not resized, (*sharpness.notes, *resized)
    return Measurement(size, trained, sharpness.resolution, is_measured, sharpness.witness, jpeg, noise, notes)


def _middle(image: Image.Image) -> Image.Image:
    """The middle of a large image, cut along the borders of its 8×8 blocks."""
    left, top = (max(0, (side - _MIDDLE) // 2) // 8 * 8 for side in image.size)
    return image.crop((left, top, min(left + _MIDDLE, image.width), min(top + _MIDDLE, image.height)))


class _Sharpness(NamedTuple):
    resolution: float
    is_known: bool
    witness: str
    notes: tuple[str, ...]


def _sharpness(found: Sharpness, pixels: Tensor, *, is_jpeg: bool) -> _Sharpness:
    """By pixels that repeat, by the spectrum, or, where that cannot tell, by edges.

    Args:
        found: by the spectrum.
        pixels: shape (3, H, W), bytes.
        is_jpeg: whether 8×8 blocks have edges of their own.
    """
    if (times := repeated(pixels)) > 1 / WORST_GOOD:
        return _Sharpness(1 / times, True, f"pixels: each one repeated {times:.3g} times", ())
    if found.resolution is None:
        blur = edge_blur(pixels, ignore_grid=is_jpeg)
        if blur is None:
            return _Sharpness(1.0, False, "", ("too few edges to measure a blur, taken as good",))
        resolution = _BLUR_OF_ENLARGING / blur if blur > SHARP else 1.0
        witness = f"edges: a blur of {blur:.1f} pixels"
    else:
        resolution = found.resolution
        in_one = " in one direction" if found.is_motion else ""
        witness = f"spectrum: {found.shortfall:.0f} dB above {found.frequency:.2f} cycles per pixel{in_one}"
    if resolution >= WORST_GOOD and not found.is_motion:
        return _Sharpness(1.0, True, "", ())
    if not _follows_a_law(pixels, _BLUR_OF_ENLARGING / resolution, moved=found.is_motion):
        return _Sharpness(1.0, False, "", (_SOFT,))
    return _Sharpness(resolution, True, witness, (MOTION,) if found.is_motion else ())


def _follows_a_law(pixels: Tensor, blur: float, *, moved: bool) -> bool:
    """Whether an image with this blur would follow the power law without it; true where that cannot be known."""
    if moved:
        return fit_power_law(pixels).exponent <= _STEEPEST_MOVED
    if blur >= _MOST_FITTED_BLUR * min(pixels.shape[1:]):  # which leaves no octave to fit a law to
        return True
    return fit_power_law(pixels, blur).is_a_law


def _noise(of_luminance: float | None, of_colors: float) -> float:
    """The larger one; that of colors alone is a pattern where the luminance has much less."""
    if of_luminance is None:
        return of_colors
    return max(of_luminance, of_colors if of_colors < _MOST_COLOR * of_luminance else 0.0)


def _in_steps(value: float, per_octave: int) -> float:
    """Rounded on a logarithmic scale, so that 0.12 and 0.13 are one defect."""
    return float(2 ** (round(per_octave * np.log2(value)) / per_octave))


class _Room:
    """Limits how much all threads hold at once.

    Args:
        most: what they may hold; who needs more than that is let in alone.
    """

    def __init__(self, most: int) -> None:
        self._most = self._free = most
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Wait for room, and have it for as long as this lasts."""
        amount = min(amount, self._most)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()


_ROOM = _Room(_MOST_PIXELS)
