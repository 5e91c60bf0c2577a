"""Which images a batch of sd-scripts holds.

sd-scripts' batches do not say it. Its data set objects know, while they make one, so they are given a subclass of their
own class that adds the paths. The batch is otherwise untouched, random numbers included.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from freq_loss_plugin import ConfigError

from ..protocols import IMAGES
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
    """Let the batches of these data sets name their images: an entry `IMAGES`, absolute paths in their order."""
    for dataset in datasets:
        dataset.__class__ = naming_images(type(dataset))


_naming_classes: dict[type, type] = {}


def naming_images(cls: Any) -> type:
    """The data set class ``cls`` with batches that say which images they hold; one for each, made once.

    A subclass with one base: an object can change to it, since it is laid out alike.
    """
    if cls in _naming_classes.values():
        return cls

    def get_item(dataset: Any, index: int) -> Any:
        example = cls.__getitem__(dataset, index)
        place = dataset.buckets_indices[index]
        first = place.batch_index * place.bucket_batch_size
        keys = dataset.bucket_manager.buckets[place.bucket_index][first : first + place.bucket_batch_size]
        example[IMAGES] = [str(Path(dataset.image_data[key].absolute_path)) for key in keys]
        return example

    def reduce(dataset: Any) -> Any:
        """Data sets are sent to loader processes by pickle where these are not forked."""
        return _rebuild, (cls, dataset.__dict__)

    if cls not in _naming_classes:
        contents = {"__getitem__": get_item, "__reduce__": reduce, "__module__": cls.__module__}
        _naming_classes[cls] = type(cls.__name__, (cls,), contents)
    return _naming_classes[cls]


def _rebuild(cls: type, state: dict[str, Any]) -> Any:
    made: Any = object.__new__(naming_images(cls))
    made.__dict__.update(state)
    return made
