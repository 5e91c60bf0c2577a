"""Which images a batch of musubi-tuner holds: the batch manager of a data set knows it, by their latent caches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from freq_loss_plugin import ConfigError

from ..naming import let_name_images
from . import host


def items_of(dataset: Any) -> list[Any]:
    """What a data set trains on, each once: musubi-tuner repeats an item in its bucket.

    Raises:
        ConfigError: its batches, by another version or class, do not say which items they hold.
    """
    manager = dataset.batch_manager
    missing = [name for name in host.MANAGER_ATTRIBUTES if getattr(manager, name, None) is None]
    if missing:
        raise ConfigError(
            f"freq_loss_image_quality: the batches of {type(dataset).__name__} have no {', '.join(missing)}, which say "
            "which images they hold; set freq_loss_image_quality = 'off'"
        )
    return list({item.latent_cache_path: item for bucket in manager.buckets.values() for item in bucket}.values())


def repeats_of(dataset: Any) -> Counter[str]:
    """How often an epoch has each item of a data set, by the path of its cache: buckets hold repeated items as such."""
    return Counter(item.latent_cache_path for bucket in dataset.batch_manager.buckets.values() for item in bucket)


def sources_of(dataset: Any) -> dict[str, Path]:
    """The image or video of each latent cache of a data set, by the path of the cache.

    Raises:
        ConfigError: a cache has none of its name in the data set's folder or list.
    """
    files = {path.stem: path for path in map(Path, _files(dataset.datasource))}
    sources = {item.latent_cache_path: files.get(item.item_key) for item in items_of(dataset)}
    without = sorted(Path(cache).name for cache, source in sources.items() if source is None)
    if without:
        raise ConfigError(
            f"freq_loss_image_quality: {len(without)} latent caches have no image of their name in the data set: "
            f"{', '.join(without[:5])}; remove the caches of images that are gone, or set freq_loss_image_quality = "
            "'off'"
        )
    return {cache: source.absolute() for cache, source in sources.items() if source is not None}


def add_to(datasets: Iterable[Any]) -> None:
    """Let the batches of these data sets name what they hold: paths of caches in their order."""
    for dataset in datasets:
        let_name_images(dataset.batch_manager, _names_of)


def _names_of(manager: Any, index: int) -> list[str]:
    bucket, number = manager.bucket_batch_indices[index]
    first = number * manager.batch_size
    return [item.latent_cache_path for item in manager.buckets[bucket][first : first + manager.batch_size]]


def _files(datasource: Any) -> list[str]:
    for name in host.SOURCE_LISTS:
        if getattr(datasource, name, None) is not None:
            return list(getattr(datasource, name))
    entries = getattr(datasource, "data", None) or []
    return [entry[key] for entry in entries for key in host.SOURCE_KEYS if key in entry]
