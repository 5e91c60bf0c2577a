"""Pixels of images as tensors. Whole images stay bytes; only what is looked at becomes floating-point numbers."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def as_bytes(image: Image.Image) -> Tensor:
    """An RGB image as a tensor of shape (3, H, W), uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def as_floats(pixels: Tensor) -> Tensor:
    """Bytes as 0..1; other tensors as they are."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def as_pixels(image: Image.Image) -> Tensor:
    """An RGB image as a tensor of shape (3, H, W), 0..1."""
    return as_floats(as_bytes(image))
