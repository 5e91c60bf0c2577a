"""Training images with known defects, in kohya's layout: toy scenes, sharp, enlarged, compressed and noisy."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

from freq_loss_plugin.toy_model.scenes import draw, random_scene


def scene(number, style="base"):
    """A sharp image of 128 × 128 pixels."""
    generator = np.random.default_rng((5, number))
    return Image.fromarray((draw(random_scene(generator), style) * 255).round().astype(np.uint8))


def enlarged(image, times):
    """What an image of fewer pixels looks like at this size."""
    small = image.resize([side // times for side in image.size], Image.Resampling.LANCZOS)
    return small.resize(image.size, Image.Resampling.BICUBIC)


def blurred(image, sigma):
    return image.filter(ImageFilter.GaussianBlur(sigma))


def compressed(image, quality):
    """JPEG, and saved again in another format."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def noisy(image, deviation):
    values = np.asarray(image) + np.random.default_rng(0).normal(0, deviation, (*image.size[::-1], 3))
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def write(folder, images):
    """Images in a folder, each with a caption that no other has."""
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        image.save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"{folder.name} {number}", encoding="utf-8")
    return folder
