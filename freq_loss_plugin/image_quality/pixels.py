"""Pixels of images as tensors. Whole images stay bytes; only what is looked at becomes floating-point numbers."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Borders are of one value, give or take what JPEG leaves, and their edge is a few pixels wide.
_MOST_OF_BORDER, _EDGE_OF_BORDER = 12, 4


def as_bytes(image: Image.Image) -> Tensor:
    """An RGB image as a tensor of shape (3, H, W), uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def as_floats(pixels: Tensor) -> Tensor:
    """Bytes as 0..1; other tensors as they are."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def as_pixels(image: Image.Image) -> Tensor:
    """An RGB image as a tensor of shape (3, H, W), 0..1."""
    return as_floats(as_bytes(image))


def without_borders(grey: Image.Image) -> Image.Image:
    """Without rows and columns of one value at its sides: the edge of a frame or letterbox is sharp in any picture."""
    pixels = np.asarray(grey).astype(np.int16)
    rows, columns = (np.ptp(pixels, axis=axis) > _MOST_OF_BORDER for axis in (1, 0))
    if not rows.any() or not columns.any():
        return grey
    (top, bottom), (left, right) = (np.flatnonzero(varied)[[0, -1]].tolist() for varied in (rows, columns))
    left, top = (side and side + _EDGE_OF_BORDER for side in (left, top))
    right, bottom = (
        side + 1 - _EDGE_OF_BORDER * (side + 1 < length)
        for side, length in zip((right, bottom), grey.size, strict=True)
    )
    return grey.crop((left, top, right, bottom)) if left < right and top < bottom else grey
