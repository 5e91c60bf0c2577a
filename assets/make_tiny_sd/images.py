"""Images and captions for the stages."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from freq_loss_plugin.toy_model.scenes import COLORS, SIZE, ImageArray, Scene, draw, random_scene

# First parts of the seeds: of training images, and of images on which no stage ever trains.
TRAINING, VALIDATION = 1, 2


def random_scenes(seed: int | tuple[int, ...], count: int) -> list[Scene]:
    """Scenes of the base style."""
    generator = np.random.default_rng(seed)
    return [random_scene(generator) for _ in range(count)]


def to_tensor(images: list[ImageArray]) -> Tensor:
    """(B, 3, H, W) in -1..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) * 2 - 1


def draw_all(scenes: list[Scene]) -> Tensor:
    """The images of scenes as (B, 3, H, W) in -1..1."""
    return to_tensor([draw(scene) for scene in scenes])


def augmented_image(generator: np.random.Generator) -> ImageArray:
    """An image for the autoencoder: a scene of the base style, half of the time mixed with another one.

    The mix has permuted color channels and is rotated by a multiple of 90°. With a probability of 0.6 a few bars in
    bright colors lie over the image, so that crops are often colored.
    """
    image = draw(random_scene(generator))
    if generator.random() < 0.5:
        other = draw(random_scene(generator))
        tilt = generator.normal(size=2)
        down, right = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
        edge = (down * tilt[0] + right * tilt[1] + 0.1 * generator.normal() > 0)[..., None]
        mixed = np.where(edge, image, other[::-1])[..., generator.permutation(3)]
        image = np.ascontiguousarray(np.rot90(mixed, generator.integers(4)))
    if generator.random() < 0.6:
        for _ in range(generator.integers(1, 4)):
            color = generator.permutation(list(COLORS.values())[generator.integers(len(COLORS))])
            height, width = np.exp(generator.uniform(math.log(6), math.log(90), size=2)).astype(int)
            top, left = generator.integers(-height // 2, SIZE), generator.integers(-width // 2, SIZE)
            bar = np.s_[max(top, 0) : top + height, max(left, 0) : left + width]
            image[bar] = color * generator.uniform(0.6, 1)
    return image
