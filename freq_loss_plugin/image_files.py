"""Image files as people have them: transparent, with 16 bits per channel, or stored rotated."""

from __future__ import annotations

import errno
import importlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# What a note says of an image, and what sd-scripts does with it.
TRANSPARENT = "transparent: taken on white (sd-scripts trains the colors hidden under it)"
DEEP = "16 bits per pixel: taken at its brightness (sd-scripts reads it as nearly white; save it with 8 bits)"
ROTATED = "stored rotated: trained as it is stored, as in sd-scripts; rotate its pixels"
NOTES = (TRANSPARENT, DEEP, ROTATED)
# What Pillow and its plug-ins raise for files that are damaged, or no images.
UNREADABLE = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)
# Of EXIF's eight orientations, 1 is upright.
_ROTATIONS = range(2, 9)
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "F")


# Plug-ins of Pillow for formats that it cannot read itself, or could not; they register themselves.
_PLUGINS = {".jxl": ("pillow_jxl", "jxlpy.JXLImagePlugin"), ".avif": ("pillow_avif",)}
_PACKAGES = {".jxl": "pillow-jxl-plugin", ".avif": "pillow-avif-plugin"}
for _module in (module for modules in _PLUGINS.values() for module in modules):
    with suppress(ImportError):
        importlib.import_module(_module)


def missing_package(files: Iterable[Path]) -> str:
    """Which package reads files that could not be read, as words for an error; "" where none would help."""
    readable = Image.registered_extensions()
    endings = sorted({file.suffix.lower() for file in files} & _PACKAGES.keys() - readable.keys())
    return "".join(f"; {ending} files need a package: pip install {_PACKAGES[ending]}" for ending in endings)


def why_unreadable(file: Path, error: Exception) -> str:
    """Why a file cannot be read, and what to do where that is not plain; a few words.

    Args:
        file: the file.
        error: one of `UNREADABLE`, which reading it raised.
    """
    if isinstance(error, Image.DecompressionBombError):
        return f"too large for Pillow, with which trainers read it, too: save it smaller; {str(error).split(', ')[0]}"
    if file.is_dir():
        return "a folder, not a file"
    if isinstance(error, PermissionError):
        return "there is no permission to read it"
    if isinstance(error, FileNotFoundError):
        return "a link to a file that is not there" if file.is_symlink() else "there is no such file"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "a link that leads in a circle"
    if not file.stat().st_size:
        return "an empty file"
    if isinstance(error, UnidentifiedImageError):
        return "no image, or of a format that Pillow cannot read, whatever its name says"
    return f"damaged: {str(error) or type(error).__name__}"


def open_rgb(file: Path) -> Image.Image:
    """An image as RGB with 8 bits: transparent ones on white, 16-bit gray ones at their brightness.

    Raises:
        OSError: it cannot be read.
    """
    with Image.open(file) as image:
        return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """The same for an open image."""
    if is_transparent(image):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode in _DEEP_MODES:
        values = np.asarray(image, dtype=np.float64)
        # Integers have 16 bits in 32; floating-point numbers, which have no scale of their own, what they contain.
        largest = max(float(values.max()), 1.0) if image.mode == "F" else 65535.0
        image = Image.fromarray((values.clip(0, largest) * (255 / largest)).round().astype(np.uint8))
    return image.convert("RGB")


def is_transparent(image: Image.Image) -> bool:
    """Whether some pixel of an open image is not opaque."""
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return False
    return bool((np.asarray(image.convert("RGBA").getchannel("A")) < 255).any())


def notes(image: Image.Image) -> list[str]:
    """What the user should know of an open image."""
    found = {
        TRANSPARENT: is_transparent(image),
        DEEP: image.mode in _DEEP_MODES,
        ROTATED: image.getexif().get(ExifTags.Base.Orientation) in _ROTATIONS,
    }
    return [note for note, holds in found.items() if holds]
