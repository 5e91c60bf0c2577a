"""Images in kohya's folder layout: finding them, reading them, and the batches of a run.

    train_data_dir/10_mycat/one.png          repeated ten times per epoch
    train_data_dir/10_mycat/one.caption      its caption; without one, "mycat"

Which images a batch holds depends only on the seed and the number of the batch, so a resumed run continues where it
stopped.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import image_files
from ..guidance_token.features import Features
from ..image_folders import in_words, listed, no_images, not_trained, of_folder, repeated
from ..image_quality.measurement import Size
from ..image_quality.sizes import Buckets, covering
from ..image_quality.survey import Survey
from ..options.fields import ConfigError
from .captions import Caption, read_caption
from .settings import Settings

# How many unreadable files an error lists.
_MAX_LISTED = 10


@dataclass(frozen=True)
class Example:
    """One image of the data set.

    Attributes:
        file: its path.
        caption: the text it is trained with.
        repeats: how often it occurs per epoch.
        size: (width, height) in pixels at which it is trained.
        content: a hash of the file.
    """

    file: Path
    caption: str
    repeats: int
    size: tuple[int, int]
    content: str = ""


@dataclass(frozen=True)
class DataSet:
    """The training images.

    Attributes:
        examples: the images.
        warnings: what the user should know about them.
        features: those for the guidance token; None without one.
        survey: what is known of the images' quality; None where that makes no difference.
    """

    examples: list[Example]
    warnings: list[str]
    features: Features | None = None
    survey: Survey | None = None

    def least_of(self, examples: Sequence[Example]) -> Tensor | None:
        """The least timesteps of a batch, shape (B,); None where none of its images has one."""
        least = [self._least.get(example.file, 0) for example in examples]
        return torch.tensor(least) if any(least) else None

    @property
    def least_per_epoch(self) -> Counter[int]:
        """How many samples of an epoch have each least timestep; 0 for those that train at all timesteps."""
        counts: Counter[int] = Counter()
        for example in self.examples:
            counts[self._least.get(example.file, 0)] += example.repeats
        return counts

    def restored(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """The latents of all examples, those of defective images restored."""
        filters = {} if self.survey is None else {image.file: one for image, one in self.survey.restorations.items()}
        return [
            filters[example.file].apply(each) if example.file in filters else each
            for example, each in zip(self.examples, latents, strict=True)
        ]

    @cached_property
    def _least(self) -> dict[Path, int]:
        return {} if self.survey is None else {image.file: least for image, least in self.survey.least.items()}

    @property
    def tag_frequency(self) -> dict[str, dict[str, int]]:
        """How often each comma-separated tag occurs, by folder: the ``ss_tag_frequency`` of a LoRA file."""
        counts: dict[str, Counter] = {}
        for example in self.examples:
            tags = [tag.strip().lower() for tag in example.caption.split(",") if tag.strip()]
            counts.setdefault(example.file.parent.name, Counter()).update(tags)
        return {folder: dict(counter) for folder, counter in counts.items()}


def find(settings: Settings) -> DataSet:
    """The images below ``train_data_dir``; all of them are opened once to check that they can be read.

    Raises:
        ConfigError: there are none, or some cannot be read; those are listed.
    """
    root = Path(settings.train_data_dir)
    examples, broken = [], {}
    noted: list[tuple[str, Path]] = []
    fallback = f"no caption file (*{settings.caption_extension}): the name of the folder is the caption"
    for folder, (repeats, name) in repeated(root).items():
        for file in of_folder(folder):
            try:
                opened = _open(file)
            except image_files.UNREADABLE as error:
                broken[file] = image_files.why_unreadable(file, error)
                continue
            caption = read_caption(file, settings.caption_extension) or Caption(name, (fallback,))
            noted += [(f"images, {note}", file) for note in (*opened.notes, *caption.notes)]
            examples.append(Example(file, caption.text, repeats, bucket(opened.size, settings), opened.content))
    if broken:
        reasons = [f"{listed([file])} ({why})" for file, why in broken.items()]
        raise ConfigError(
            f"{len(broken)} images cannot be read: {'; '.join(reasons[:_MAX_LISTED])}; repair or remove them"
            + image_files.missing_package(broken)
        )
    others = in_words(not_trained(root))
    if not examples:
        raise no_images(f"train_data_dir = {settings.train_data_dir!r}", others)
    return DataSet(examples, [*others, *in_words(noted)])


def split(data: DataSet, fraction: float, seed: int) -> tuple[DataSet, list[Example]]:
    """Split off validation images: the same ones wherever the images lie.

    Args:
        data: the images.
        fraction: the fraction of images to split off, at least one image.
        seed: decides which.

    Returns:
        The data set without them, and the validation images.

    Raises:
        ConfigError: there would be no image left to train on.
    """
    count = max(1, round(fraction * len(data.examples)))
    if count >= len(data.examples):
        raise ConfigError(
            f"validation_split = {fraction} takes {count} of {len(data.examples)} images and leaves none to train on"
        )
    ordered = sorted(data.examples, key=lambda example: example.content)
    held_out = random.Random(f"validation:{seed}").sample(ordered, count)
    chosen = set(held_out)
    return replace(data, examples=[example for example in data.examples if example not in chosen]), held_out


def bucket(image: Size, settings: Settings) -> Size:
    """The (width, height) at which an image of this (width, height) is trained, as in sd-scripts.

    Args:
        image: its width and height.
        settings: those of the run.
    """
    limits, step = settings.bucket_limits, settings.bucket_reso_steps
    return Buckets(settings.size, enabled=settings.enable_bucket, limits=limits, step=step).bucket(image)


def resized_size(example: Example) -> Size:
    """(width, height) to which an image is scaled, so that it covers the size at which it is trained."""
    with Image.open(example.file) as image:
        return covering(image.size, example.size)


def load_pixels(example: Example) -> Tensor:
    """The image, scaled to cover its size and center-cropped: shape (3, H, W), -1..1."""
    width, height = example.size
    image = image_files.open_rgb(example.file)
    size = covering(image.size, example.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


class Batches:
    """The batches of a run, by number; all images of a batch have the same size.

    Args:
        examples: the images.
        batch_size: images per batch; the last batch of a size in an epoch may have fewer.
        seed: determines the order, together with the number of the epoch.
    """

    def __init__(self, examples: list[Example], batch_size: int, seed: int) -> None:
        self._batch_size, self._seed = batch_size, seed
        self._by_size: dict[tuple[int, int], list[int]] = {}
        for index, example in enumerate(examples):
            self._by_size.setdefault(example.size, []).extend([index] * example.repeats)
        self.per_epoch = sum(-(-len(indices) // batch_size) for indices in self._by_size.values())
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __getitem__(self, number: int) -> list[int]:
        """Indices of the images in batch ``number``, counted from the start of the run."""
        epoch, place = divmod(number, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        return self._epoch[1][place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        order = random.Random(f"batches:{self._seed}:{epoch}")
        batches = []
        for indices in self._by_size.values():
            indices = order.sample(indices, len(indices))
            batches += [indices[i : i + self._batch_size] for i in range(0, len(indices), self._batch_size)]
        order.shuffle(batches)
        return batches


class _Opened(NamedTuple):
    size: tuple[int, int]
    notes: list[str]
    content: str


def _open(file: Path) -> _Opened:
    """(width, height), what the user should know, and a hash; raises `image_files.UNREADABLE`."""
    content = file.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        return _Opened(image.size, image_files.notes(image), hashlib.sha256(content).hexdigest())
