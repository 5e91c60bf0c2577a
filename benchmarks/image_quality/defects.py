"""What people's images suffer from, what they do not, and what could fool a measurement; by Pillow, NumPy and SciPy."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage, signal

from benchmarks.photographs.images import halftone

Make: TypeAlias = Callable[[Image.Image, np.random.Generator], Image.Image]
_R, _T = Image.Resampling, Image.Transpose


def _pixels(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _saved(image: Image.Image, kind: str, **options: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer).convert("RGB")


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    return _saved(image, "JPEG", quality=quality)


def enlarged(times: float, by: Image.Resampling = _R.BICUBIC) -> Make:
    """From a version that was reduced well."""

    def make(image: Image.Image, _numbers: np.random.Generator) -> Image.Image:
        return image.resize([round(side / times) for side in image.size], _R.LANCZOS).resize(image.size, by)

    return make


def gaussian(sigma: float) -> Make:
    """A blur."""
    return lambda image, _: _pixels(
        ndimage.gaussian_filter(np.asarray(image, float), (sigma, sigma, 0), mode="nearest")
    )


def _convolved(image: Image.Image, kernel: np.ndarray) -> Image.Image:
    margin = kernel.shape[0] // 2
    padded = np.pad(np.asarray(image, float), ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    kernel = kernel / kernel.sum()
    return _pixels(np.stack([signal.fftconvolve(padded[..., each], kernel, "valid") for each in range(3)], axis=2))


def disk(radius: float) -> Make:
    """Out of focus."""
    y, x = np.mgrid[-int(radius) - 1 : int(radius) + 2, -int(radius) - 1 : int(radius) + 2]
    return lambda image, _: _convolved(image, np.clip(radius + 0.5 - np.hypot(x, y), 0, 1))


def moved(length: float) -> Make:
    """Along a line in any direction."""

    def make(image: Image.Image, numbers: np.random.Generator) -> Image.Image:
        angle, reach = numbers.uniform(0, np.pi), int(length / 2) + 1
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        return _convolved(image, np.clip(length / 2 + 0.5 - abs(along), 0, 1) * np.clip(1 - abs(across), 0, 1))

    return make


def noisy(sigma: float, channels: int = 1, grain: float = 0.0) -> Make:
    """Noise of the luminance, or of each channel; or grain, which is noise that was blurred."""

    def make(image: Image.Image, numbers: np.random.Generator) -> Image.Image:
        noise = numbers.standard_normal((image.height, image.width, channels))
        if grain:
            noise = ndimage.gaussian_filter(noise, (grain, grain, 0), mode="wrap")
        return _pixels(np.asarray(image, float) + noise * sigma / noise.std())

    return make


def then(*steps: Make) -> Make:
    """One after another."""

    def make(image: Image.Image, numbers: np.random.Generator) -> Image.Image:
        for step in steps:
            image = step(image, numbers)
        return image

    return make


def _small_then(times: int, step: Make) -> Make:
    def make(image: Image.Image, numbers: np.random.Generator) -> Image.Image:
        small = image.resize([side // times for side in image.size], _R.LANCZOS)
        return step(small, numbers).resize(image.size, _R.BICUBIC)

    return make


def jpeg(quality: int) -> Make:
    """Compressed."""
    return lambda image, _: _jpeg(image, quality)


def webp(quality: int) -> Make:
    """Compressed."""
    return lambda image, _: _saved(image, "WEBP", quality=quality)


def _sharpened(image: Image.Image, _numbers: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.UnsharpMask(2, 150, 2))


def _turned(image: Image.Image, _numbers: np.random.Generator) -> Image.Image:
    return image.transpose(_T.ROTATE_90)


def _cut(image: Image.Image, numbers: np.random.Generator) -> Image.Image:
    left, top = map(int, numbers.integers(1, 8, 2))
    return image.crop((left, top, image.width, image.height))


def _resized(image: Image.Image, numbers: np.random.Generator) -> Image.Image:
    factor = numbers.uniform(0.7, 1.4)
    return image.resize([round(side * factor) for side in image.size], _R.LANCZOS if factor < 1 else _R.BICUBIC)


def _reduced(image: Image.Image, _numbers: np.random.Generator) -> Image.Image:
    return image.resize([side // 2 for side in image.size], _R.LANCZOS)


def _bokeh(image: Image.Image, numbers: np.random.Generator) -> Image.Image:
    """6% of the picture are in focus."""
    radius = np.sqrt(0.06 * image.width * image.height / np.pi)
    x, y = (numbers.uniform(radius, side - radius) for side in image.size)
    rows, columns = np.mgrid[: image.height, : image.width]
    focus = np.clip(radius + 4 - np.hypot(columns - x, rows - y), 0, 8)[..., None] / 8
    return _pixels(np.asarray(gaussian(7)(image, numbers), float) * (1 - focus) + np.asarray(image, float) * focus)


def _night(image: Image.Image, numbers: np.random.Generator) -> Image.Image:
    return noisy(2, channels=3)(_pixels(255 * 0.35 * (np.asarray(image, float) / 255) ** 1.8), numbers)


def _fog(image: Image.Image, _numbers: np.random.Generator) -> Image.Image:
    return _pixels(0.3 * np.asarray(image, float) + 0.6 * 235)


def _framed(image: Image.Image, _numbers: np.random.Generator) -> Image.Image:
    ImageDraw.Draw(image := image.copy()).rectangle(
        (0, 0, image.width - 1, image.height - 1), outline="white", width=20
    )
    return image


def _letterboxed(image: Image.Image, _numbers: np.random.Generator) -> Image.Image:
    height = image.height // 8
    (image := image.copy()).paste("black", (0, 0, image.width, height))
    image.paste("black", (0, image.height - height, image.width, image.height))
    return image


def _with_text(image: Image.Image, _numbers: np.random.Generator) -> Image.Image:
    ImageDraw.Draw(image := image.copy()).text((20, image.height - 60), "© a photographer, 2026", "white", font_size=28)
    return image


def _with_logo(image: Image.Image, _numbers: np.random.Generator) -> Image.Image:
    draw = ImageDraw.Draw(image := image.copy())
    for number in range(6):
        draw.ellipse((20 + 8 * number, 20, 60 + 8 * number, 60), outline="red", fill="white" if number % 2 else "blue")
    return image


_X4 = enlarged(4)
MISSING = {
    "enlarged 2 times, bicubic": enlarged(2),
    "enlarged 2 times, Lanczos": enlarged(2, _R.LANCZOS),
    "enlarged 3 times": enlarged(3),
    "enlarged 3 times, sharpened": then(enlarged(3), _sharpened),
    "enlarged 4 times, bicubic": _X4,
    "enlarged 4 times, Lanczos": enlarged(4, _R.LANCZOS),
    "enlarged 4 times, bilinear": enlarged(4, _R.BILINEAR),
    "enlarged 4 times, nearest": enlarged(4, _R.NEAREST),
    "enlarged 4 times, sharpened": then(_X4, _sharpened),
    "enlarged 4 times, JPEG 85": then(_X4, jpeg(85)),
    "JPEG 70, enlarged 4 times": _small_then(4, jpeg(70)),
    "enlarged 4 times, grain 8": then(_X4, noisy(8)),
    "enlarged 8 times": enlarged(8),
    **{f"blurred, sigma {sigma:g}": gaussian(sigma) for sigma in (1.5, 3, 6, 10, 16)},
    **{f"out of focus, radius {radius}": disk(radius) for radius in (4, 10, 20)},
    **{f"moved by {length} pixels": moved(length) for length in (9, 15, 25)},
}
_AGAIN: dict[str, Make] = {
    "PNG": lambda image, _: image,
    "JPEG 90": jpeg(90),
    "JPEG 95": jpeg(95),
    "turned": _turned,
    "cut": _cut,
    "cut, JPEG 90": then(_cut, jpeg(90)),
    "resized": _resized,
}
COMPRESSED = {
    f"JPEG {quality}, then {name}": then(jpeg(quality), make)
    for quality in (10, 20, 30, 45)
    for name, make in _AGAIN.items()
}
NOISY = {
    "noise 15": noisy(15),
    "noise 15 in each channel": noisy(15, channels=3),
    "noise 15, JPEG 85": then(noisy(15), jpeg(85)),
    "noise 15, WebP 85": then(noisy(15), webp(85)),
    "noise 25": noisy(25),
    "grain 15 of 3 pixels": noisy(15, grain=1.2),
}
GOOD: dict[str, Make] = {
    "sharp": lambda image, _: image,
    "reduced to half": _reduced,
    "6% in focus": _bokeh,
    "night": _night,
    "fog": _fog,
    "grain 4": noisy(4),
    "grain 5.5 in each channel": noisy(5.5, channels=3),
    "JPEG 85": jpeg(85),
    "WebP 90": webp(90),
    "halftone": halftone,
}
_COVERS: dict[str, Make] = {"frame": _framed, "letterbox": _letterboxed, "text": _with_text, "logo": _with_logo}
FOOLING = {f"{name} on enlarged 4 times": then(_X4, make) for name, make in _COVERS.items()}
NOT_FOOLED = {f"{name} on sharp": make for name, make in _COVERS.items()}
