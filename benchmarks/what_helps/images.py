"""Training images with defects, as files: a few sharp ones that are alike, and many varied ones."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from .world import Captioned, World

SHARP, VARIED = 6, 18
# all: with defects; restored: without; sharp: those that are alike alone; varied: as many varied ones, all sharp.
Images = Literal["all", "restored", "sharp", "varied"]
# For images of 128 pixels; smaller ones are blurred by as many fewer.
_BLUR, _BLUR_SIDE = 2.0, 128
_NOISE, _JPEG = 20.0, 10
DEFECTS = ("enlarged 4 times", "enlarged 8 times", "blur", "JPEG 10", "noise")
MIXTURE = "mixture"


def write(world: World, images: Images, defect: str, seed: int, folder: Path) -> dict[Path, str]:
    """Write the training images of a trial; returns their captions."""
    if images == "varied":
        chosen = world.training(seed, SHARP + VARIED)
    else:
        chosen = [*world.uniform(seed, SHARP), *([] if images == "sharp" else world.training(seed, VARIED))]
    captions = {}
    for number, each in enumerate(chosen):
        is_bad = images == "all" and number >= SHARP
        kind = DEFECTS[number % len(DEFECTS)] if defect == MIXTURE else defect
        ending, content = damaged(each, kind if is_bad else None, seed + number)
        file = folder / f"{number:03}.{ending}"
        file.write_bytes(content)
        captions[file] = each.caption
    return captions


def damaged(image: Captioned, defect: str | None, seed: int) -> tuple[str, bytes]:
    """The ending and content of a file with the image.

    The defects are made by Pillow and NumPy alone, and not by what the plug-in makes its references with.
    """
    values = (image.pixels.permute(1, 2, 0).numpy() * 255).round()
    if defect == "noise":
        values = values + _NOISE * np.random.default_rng((61, seed)).standard_normal(values.shape)
    picture = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    size = picture.size
    if defect is not None and defect.startswith("enlarged"):
        times = int(defect.split()[1])
        small = picture.resize((size[0] // times, size[1] // times), Image.Resampling.BOX)
        picture = small.resize(size, Image.Resampling.BICUBIC)
    elif defect == "blur":
        picture = picture.filter(ImageFilter.GaussianBlur(_BLUR * size[0] / _BLUR_SIDE))
    buffer = io.BytesIO()
    if defect == "JPEG 10":
        picture.save(buffer, "JPEG", quality=_JPEG)
        return "jpg", buffer.getvalue()
    picture.save(buffer, "PNG")
    return "png", buffer.getvalue()


def read(files: list[Path]) -> Tensor:
    """Shape (n, 3, H, W), 0..1."""
    pixels = [np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 255 for file in files]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
