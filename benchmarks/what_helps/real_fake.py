"""Real-Fake's own task: a classifier that is trained on samples alone, tested on real images.

Source: Yuan et al. (2023), arXiv 2310.10402, which adapts a text-to-image model to a data set with a distribution-
matching loss and trains classifiers on what it draws.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn import Conv2d, Linear

from assets.make_tiny_flow import emoji

from .emoji import EmojiTrainee

CLASSES, POOL = 12, 16
PER_CLASS, GUIDANCE, SAMPLING_STEPS = 100, 2.0, 10
_EPOCHS, _BATCH, _RATE, _SIDE, _SHIFT = 15, 32, 3e-3, 32, 3


class Task(NamedTuple):
    """What is drawn, and what is recognized.

    Attributes:
        pool: `POOL` concepts of each class; those before k are trained on, all are sampled.
        test: the other concepts of each class.
    """

    pool: list[list[emoji.Concept]]
    test: list[list[emoji.Concept]]


def make_task(concepts: list[emoji.Concept], seed: int) -> Task:
    """The `CLASSES` largest subcategories, all faces being one; the seed chooses the pools."""
    by_class: dict[str, list[emoji.Concept]] = defaultdict(list)
    for concept in concepts:
        by_class["face" if concept.category.startswith("face-") else concept.category].append(concept)
    largest = sorted(by_class.values(), key=len, reverse=True)[:CLASSES]
    orders = [np.random.default_rng((71, seed, number)).permutation(len(some)) for number, some in enumerate(largest)]
    shuffled = [[some[place] for place in order] for some, order in zip(largest, orders, strict=True)]
    return Task([some[:POOL] for some in shuffled], [some[POOL:] for some in shuffled])


def write(task: Task, k: int, style: str, folder: Path) -> dict[Path, str]:
    """Write k training images of each class; returns their captions."""
    captions = {}
    for number, concept in enumerate(concept for pool in task.pool for concept in pool[:k]):
        file = folder / f"{number:03}.png"
        drawn = emoji.image(emoji.fetch(), concept, style)
        Image.fromarray((drawn * 255).round().astype(np.uint8)).save(file)
        captions[file] = concept.caption(style)
    return captions


def accuracy_of_samples(trainee: EmojiTrainee, task: Task, style: str, seed: int) -> float:
    """Of a classifier that is trained on `PER_CLASS` samples of each class."""
    prompts = [pool[number % POOL].caption(style) for pool in task.pool for number in range(PER_CLASS)]
    samples = trainee.sample(prompts, guidance=GUIDANCE, strength=1.0, first_seed=10_000 * seed, steps=SAMPLING_STEPS)
    return accuracy(samples, torch.arange(CLASSES).repeat_interleave(PER_CLASS), task, style, seed)


def accuracy_of_real(task: Task, k: int, style: str, seed: int) -> float:
    """Of a classifier that is trained on the k real images of each class."""
    pixels = _images([pool[:k] for pool in task.pool], style)
    repeats = PER_CLASS // k
    labels = torch.arange(CLASSES).repeat_interleave(k).repeat(repeats)
    return accuracy(pixels.repeat(repeats, 1, 1, 1), labels, task, style, seed)


def accuracy(pixels: Tensor, labels: Tensor, task: Task, style: str, seed: int) -> float:
    """The mean over classes of the fraction of right answers, on the real images of the concepts that are tested."""
    torch.manual_seed(seed)
    pixels = _reduced(pixels)
    network = _network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=0.05)
    length = _EPOCHS * -(-len(pixels) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length)
    for _ in range(_EPOCHS):
        for chosen in torch.randperm(len(pixels)).split(_BATCH):
            loss = F.cross_entropy(network(_augmented(pixels[chosen]) * 2 - 1), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        answers = [network(_reduced(_images([some], style)) * 2 - 1).argmax(dim=1) for some in task.test]
    return float(np.mean([(given == number).float().mean() for number, given in enumerate(answers)]))


def _network() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), Linear(512, CLASSES))


def _reduced(pixels: Tensor) -> Tensor:
    return F.interpolate(pixels, (_SIDE, _SIDE), mode="area")


def _augmented(pixels: Tensor) -> Tensor:
    """Flipped half of the time, and shifted by a few pixels on white."""
    flipped = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(3), pixels)
    padded = F.pad(flipped, (_SHIFT,) * 4, value=1.0)
    top, left = (int(torch.randint(2 * _SHIFT + 1, ())) for _ in range(2))
    return padded[:, :, top : top + pixels.shape[2], left : left + pixels.shape[3]]


def _images(concepts: list[list[emoji.Concept]], style: str) -> Tensor:
    flat = [concept for some in concepts for concept in some]
    return torch.from_numpy(emoji.images(emoji.fetch(), flat, style)).permute(0, 3, 1, 2).contiguous()
