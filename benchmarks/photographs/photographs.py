"""Where the photographs are, and squares out of them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

# Pixels along each side of what is trained; latents have an eighth of it.
SIDE = 192
_VARIABLE = "FREQ_LOSS_PHOTOS"
_CACHE = Path.home() / ".cache" / "freq_loss_plugin" / "photos"
_ENDINGS = (".jpg", ".png", ".tif")
# Of the data set of the base models these are not trained on.
_HELD_OUT = 20


def base_photographs() -> tuple[list[Path], list[Path]]:
    """BSDS500: what the base models learn from, and `_HELD_OUT` others."""
    files = [file for folder in ("train", "test", "val") for file in _files(folder)]
    return files[:-_HELD_OUT], files[-_HELD_OUT:]


def study_photographs() -> list[Path]:
    """Kodak's and McMaster's, 42 that the base models have not seen."""
    return [*_files("kodak"), *_files("mcmaster")]


def test_photographs() -> list[Path]:
    """The test images of BSDS500, most of which the base models have seen."""
    return _files("test")


def random_square(image: Image.Image, numbers: np.random.Generator) -> Image.Image:
    """A square from anywhere in a photograph, of any size, reduced to `SIDE`; or its mirror image."""
    return _square(image, int(numbers.integers(SIDE, min(image.size) + 1)), numbers)


def half_square(image: Image.Image, numbers: np.random.Generator) -> Image.Image:
    """The same at half of the photograph's resolution: detail that cameras blur is gone."""
    return _square(image, 2 * SIDE, numbers)


def _square(image: Image.Image, side: int, numbers: np.random.Generator) -> Image.Image:
    left, top = (int(numbers.integers(length - side + 1)) for length in image.size)
    square = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if numbers.integers(2) else square


def _files(name: str) -> list[Path]:
    folder = Path(os.environ.get(_VARIABLE, _CACHE)) / name
    files = sorted(file for file in folder.glob("*") if file.suffix in _ENDINGS)
    if not files:
        raise FileNotFoundError(
            f"no photographs in {folder}; expected the folders train, val and test of BSDS500 (github.com/BIDS/"
            f"BSDS500, BSDS500/data/images), kodak (Kodak Lossless True Color suite) and mcmaster (McMaster's data set "
            f"for demosaicking) in {folder.parent}, or where {_VARIABLE} says"
        )
    return files
