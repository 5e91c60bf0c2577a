"""Images in kohya's folder layout: finding them, reading them, and the batches of a run.

    train_data_dir/10_mycat/one.png          repeated ten times per epoch
    train_data_dir/10_mycat/one.caption      its caption; without one, "mycat"

Which images a batch holds depends only on the seed and the number of the batch, so a resumed run continues where it
stopped.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import image_files
from ..guidance_token.features import Features
from ..image_folders import ENDINGS, left_out, of_folder, repeated
from ..image_quality.survey import Survey
from ..options.fields import ConfigError
from .captions import Caption, read_caption
from .settings import Settings

# How many file names an error or a warning lists.
_MAX_LISTED = 10
_LEFT_OUT = "left out, since sd-scripts does not read their format; save them as PNG"


@dataclass(frozen=True)
class Example:
    """One image of the data set.

    Attributes:
        file: its path.
        caption: the text it is trained with.
        repeats: how often it occurs per epoch.
        size: (width, height) in pixels at which it is trained.
    """

    file: Path
    caption: str
    repeats: int
    size: tuple[int, int]


@dataclass(frozen=True)
class DataSet:
    """The training images.

    Attributes:
        examples: the images.
        warnings: what the user should know about them.
        features: those for the guidance token; None without one.
        survey: what is known of the images' quality; None where all train at all noise levels.
    """

    examples: list[Example]
    warnings: list[str]
    features: Features | None = None
    survey: Survey | None = None

    def least_of(self, examples: Sequence[Example]) -> Tensor | None:
        """The least timesteps of a batch, shape (B,); None where none of its images has one."""
        if self.survey is None:
            return None
        least = [self.survey.least.get(example.file, 0) for example in examples]
        return torch.tensor(least) if any(least) else None

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
    examples, broken = [], []
    noted: dict[str, list[Path]] = defaultdict(list)
    folders = repeated(root)
    ignored = sorted(path.name for path in root.iterdir() if path.is_dir() and path not in folders)
    fallback = f"no caption file (*{settings.caption_extension}): the name of the folder is the caption"
    for folder, (repeats, name) in folders.items():
        for file in left_out(folder):
            noted[_LEFT_OUT].append(file)
        for file in of_folder(folder):
            opened = _open(file)
            if opened is None:
                broken.append(file)
                continue
            caption = read_caption(file, settings.caption_extension) or Caption(name, (fallback,))
            for note in (*opened.notes, *caption.notes):
                noted[note].append(file)
            examples.append(Example(file, caption.text, repeats, bucket(opened.size, settings)))
    if broken:
        hint = image_files.missing_package(broken)
        raise ConfigError(f"images that cannot be read: {_list(broken, root)}; repair or remove them{hint}")
    if not examples:
        raise ConfigError(
            f"train_data_dir = {settings.train_data_dir!r}: no images. Expected folders named like 10_mycat "
            f"(repeats, underscore, any name) with {', '.join(ENDINGS)} files in them"
            + (f"; found only {', '.join(ignored[:_MAX_LISTED])}" if ignored else "")
        )
    warnings = []
    if ignored:
        warnings.append(
            f"folders without a number of repeats in their name are ignored: {', '.join(ignored[:_MAX_LISTED])}"
        )
    warnings += [f"{len(files)} images, {note}: {_list(files, root)}" for note, files in noted.items()]
    return DataSet(examples, warnings)


def split(data: DataSet, fraction: float, seed: int) -> tuple[DataSet, list[Example]]:
    """Split off validation images.

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
    chosen = set(random.Random(f"validation:{seed}").sample(range(len(data.examples)), count))
    kept = [example for index, example in enumerate(data.examples) if index not in chosen]
    return replace(data, examples=kept), [data.examples[index] for index in sorted(chosen)]


def bucket(image: tuple[int, int], settings: Settings) -> tuple[int, int]:
    """The (width, height) at which an image of this (width, height) is trained.

    Without buckets, this is the resolution. With them, it is the bucket with the nearest aspect ratio; a bucket has at
    most the area of the resolution and sides that are multiples of ``bucket_reso_steps``. As in sd-scripts.
    """
    if not settings.enable_bucket:
        return settings.size
    ratio = image[0] / image[1]
    return min(_buckets(settings), key=lambda size: abs(size[0] / size[1] - ratio))


def _buckets(settings: Settings) -> list[tuple[int, int]]:
    area, step = settings.size[0] * settings.size[1], settings.bucket_reso_steps
    least, most = settings.bucket_limits
    buckets = {(side, min(most, area // side // step * step)) for side in range(least, most + 1, step)}
    buckets = {size for size in buckets if size[1] >= least}
    square = int(area**0.5) // step * step
    buckets |= {(height, width) for width, height in buckets} | {(square, square)}
    return sorted(size for size in buckets if size[1] > 0)


def resized_size(example: Example) -> tuple[int, int]:
    """(width, height) to which an image is scaled, so that it covers the size at which it is trained."""
    with Image.open(example.file) as image:
        return _covering(image.size, example.size)


def _covering(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    scale = max(size[0] / image[0], size[1] / image[1])
    return max(size[0], round(image[0] * scale)), max(size[1], round(image[1] * scale))


def load_pixels(example: Example) -> Tensor:
    """The image, scaled to cover its size and center-cropped: shape (3, H, W), -1..1."""
    width, height = example.size
    image = image_files.open_rgb(example.file)
    covering = _covering(image.size, example.size)
    if covering != image.size:
        image = image.resize(covering, Image.Resampling.LANCZOS)
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


def _open(file: Path) -> _Opened | None:
    """(width, height) and what the user should know, or None if the file is not a complete image."""
    try:
        with Image.open(file) as image:
            image.load()
            return _Opened(image.size, image_files.notes(image))
    except image_files.UNREADABLE:
        return None


def _list(files: list[Path], root: Path) -> str:
    names = [str(file.relative_to(root)) for file in files[:_MAX_LISTED]]
    return ", ".join(names) + (f" and {len(files) - _MAX_LISTED} more" if len(files) > _MAX_LISTED else "")
