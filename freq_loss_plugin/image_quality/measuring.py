"""All images of a run are measured: once, in few threads, with few of them in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import torch
from tqdm import tqdm

from .. import image_files
from . import measurement_cache
from .measurement import Measurement
from .trained_image import TrainedImage

# A measurement, or why there is none.
Measured: TypeAlias = Measurement | str
# Each holds up to 60 MB, for an image of 1024 pixels.
_MOST_THREADS = 4


def measure_all(images: Iterable[TrainedImage]) -> dict[TrainedImage, Measured]:
    """Measure images, except for those that are known from an earlier run."""
    keys = measurement_cache.keys_of(images := list(images))
    known = measurement_cache.read(keys)
    new = measure_anew([image for image in images if image not in known])
    measurement_cache.add(keys, new)
    return {image: known[image] if image in known else new[image] for image in images}


def measure_anew(images: Sequence[TrainedImage], *, quiet: bool = False) -> dict[TrainedImage, Measured]:
    """Measure images in several threads, with a progress bar.

    Args:
        images: what to measure.
        quiet: without the bar, which one process of several shows.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each thread its own image
    try:
        with ThreadPoolExecutor(_thread_count()) as pool:
            results = pool.map(_try_to_measure, images)
            bar = tqdm(results, "measuring images", len(images), disable=quiet or not images, leave=False)
            return dict(zip(images, bar, strict=True))
    finally:
        torch.set_num_threads(threads)


def _thread_count() -> int:
    """As many as this process has cores, beside the run's other processes on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(1, min(cores // processes, _MOST_THREADS))


def _try_to_measure(image: TrainedImage) -> Measured:
    try:
        return image.measure()
    except image_files.UNREADABLE as error:
        return image_files.why_unreadable(image.file, error)
