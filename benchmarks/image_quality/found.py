"""What is found in one image, and what others would say."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from freq_loss_plugin.image_files import open_rgb
from freq_loss_plugin.image_quality.measurement import measure_image

from .defects import COMPRESSED, FOOLING, GOOD, MISSING, NOISY, NOT_FOOLED

KINDS = {"resolution": {**MISSING, **FOOLING}, "jpeg": COMPRESSED, "noise": NOISY, "": {**GOOD, **NOT_FOOLED}}
MAKES = {name: make for makes in KINDS.values() for name, make in makes.items()}


class Found(NamedTuple):
    """Of one image: what was found, whether nothing could be said, its effective resolution, and others' scores."""

    kinds: tuple[str, ...]
    is_unknown: bool
    resolution: float
    scores: dict[str, float]


def measure(name: str, file: Path) -> Found:
    """Make a defect on a photograph, and measure that."""
    torch.set_num_threads(1)
    image = MAKES[name](open_rgb(file), np.random.default_rng(zlib.crc32(f"{name} {file.name}".encode())))
    one = measure_image(image)
    defect = one.defect
    kinds = {"resolution": defect.resolution < 1, "jpeg": defect.jpeg is not None, "noise": defect.noise > 0}
    scores = {score: witness(image) for score, witness in _others().items()}
    return Found(tuple(kind for kind, is_there in kinds.items() if is_there), not one.is_known, one.resolution, scores)


def _others() -> dict[str, Callable[[Image.Image], float]]:
    """What others use: less is worse."""
    return {"variance of the Laplacian": _laplacian}


def _laplacian(image: Image.Image) -> float:
    return float(ndimage.laplace(np.asarray(image.convert("L"), float)).var())
