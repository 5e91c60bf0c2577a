"""Which images a batch of sd-scripts holds: its data set objects know, while they make one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from freq_loss_plugin import ConfigError

from ..naming import let_name_images
from . import host


def check(datasets: Iterable[Any], option: str, remedy: str) -> None:
    """Raise ConfigError where a data set, by a class of the user's own, does not know which images its batches hold.

    Args:
        datasets: of the run.
        option: the one that needs to know.
        remedy: what to do without it.
    """
    for dataset in datasets:
        missing = [name for name in host.DATASET_ATTRIBUTES if getattr(dataset, name, None) is None]
        if missing:
            raise ConfigError(
                f"{option}: the data set class {type(dataset).__name__} has no {', '.join(missing)}, which say which "
                f"images a batch holds; use a data set of sd-scripts (remove dataset_class), or {remedy}"
            )


def add_to(datasets: Iterable[Any]) -> None:
    """Let the batches of these data sets name their images, as `name_of` does, in their order."""
    for dataset in datasets:
        let_name_images(dataset, _names_of)


def name_of(info: Any) -> str:
    """What a batch calls an image: its path and the size at which it is trained; data sets may train it at several.

    Args:
        info: sd-scripts' description of the image.
    """
    width, height = size_of(info)
    return f"{Path(info.absolute_path)} {width}x{height}"


def size_of(info: Any) -> tuple[int, int]:
    """(width, height) to which an image is resized before it is cropped."""
    width, height = info.resized_size or info.bucket_reso
    return int(width), int(height)


def _names_of(dataset: Any, index: int) -> list[str]:
    place = dataset.buckets_indices[index]
    first = place.batch_index * place.bucket_batch_size
    keys = dataset.bucket_manager.buckets[place.bucket_index][first : first + place.bucket_batch_size]
    return [name_of(dataset.image_data[key]) for key in keys]
