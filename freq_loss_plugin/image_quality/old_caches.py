"""Cached latents of images that have been replaced since: what trains then is the earlier image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from .survey import listed


def warn_of_old(images: Mapping[Path, Path], others: Iterable[Path] = ()) -> list[str]:
    """A warning that names the caches that are older than their image, by the times of change; none without such.

    Args:
        images: the image, or video, of each cache.
        others: caches of which it is known otherwise.
    """
    old = sorted({*others, *(cache for cache, image in images.items() if _is_older(cache, image))})
    if not old:
        return []
    names = [f"{cache.name} (of {images[cache].name})" for cache in old]
    return [
        f"{len(old)} images are newer than their cached latents, or of another size: {listed(names)}. If they were "
        "replaced, the run trains the earlier ones, at the quality of the new ones: delete these caches, and cache the "
        "latents again"
    ]


def _is_older(cache: Path, image: Path) -> bool:
    try:
        return cache.stat().st_mtime < image.stat().st_mtime
    except OSError:
        return False
