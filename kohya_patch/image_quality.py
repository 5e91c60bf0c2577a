"""Image quality in a training program: what is known of a run's images, for the samples of each batch.

The processes measure the images together, each its share, and one of them compares qualities by the VAE. What is wrong
with the images is the same in all afterward; so is an error, so that none waits for one that has stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from freq_loss_plugin import ConfigError
from freq_loss_plugin.image_quality import measurement_cache
from freq_loss_plugin.image_quality.measurement import Measurement
from freq_loss_plugin.image_quality.measuring import Measured, measure_anew
from freq_loss_plugin.image_quality.survey import Survey
from freq_loss_plugin.image_quality.trained_image import TrainedImage
from freq_loss_plugin.training.distributed import gather, process_share, there_are_several

from .protocols import IMAGES, Batch

OPTION = "freq_loss_image_quality"

T = TypeVar("T")


class ImageQuality:
    """What is known of the images of one run.

    Args:
        survey: the result for all images.
        names: what the batches call each image.
        repeats: how often an epoch has each of them.

    Attributes:
        survey: see above.
        least: how many samples of an epoch have each least timestep; 0 for those that train at all timesteps.
    """

    def __init__(self, survey: Survey, names: Mapping[str, TrainedImage], repeats: Mapping[str, int]) -> None:
        self.survey = survey
        self._least = {name: survey.least[image] for name, image in names.items() if image in survey.least}
        self._restorations = {
            name: survey.restorations[image] for name, image in names.items() if image in survey.restorations
        }
        self.least: Counter[int] = Counter()
        for name, times in repeats.items():
            self.least[self._least.get(name, 0)] += times

    def least_of(self, batch: Batch) -> Tensor | None:
        """The least timesteps of a batch's samples, shape (B,), on the CPU; None where none has one."""
        least = [self._least.get(name, 0) for name in batch[IMAGES]]
        return torch.tensor(least) if any(least) else None

    def restored(self, batch: Batch, latents: Tensor) -> Tensor:
        """The latents of a batch, those of defective images restored; the very same where there are none.

        Args:
            batch: names its images.
            latents: shape (B, C, H, W) or (B, C, T, H, W), scaled as the model is trained on them.
        """
        restorations = [self._restorations.get(name) for name in batch[IMAGES]]
        if not any(restorations):
            return latents
        is_video = latents.ndim == 5
        parts = list(latents.transpose(1, 2) if is_video else latents)
        for number, restoration in enumerate(restorations):
            if restoration is not None:
                parts[number] = restoration.apply(parts[number])
        result = torch.stack(parts)
        return result.transpose(1, 2) if is_video else result


def measure_together(images: Sequence[TrainedImage]) -> dict[TrainedImage, Measured]:
    """Measure images that no earlier run has measured, each process its share; the result is that of all.

    Args:
        images: the same in all processes.

    Raises:
        ConfigError: a process has failed, and said why.
    """
    images = sorted(images, key=repr)
    keys: dict[TrainedImage, str] = {}  # of the first process, which alone reads and writes

    def read() -> list[Measurement | None]:
        keys.update(measurement_cache.keys_of(images))
        found = measurement_cache.read(keys)
        return [found.get(image) for image in images]  # by index: the source of a video's frame cannot be pickled

    known = in_one_process(read)
    missing = [image for image, one in zip(images, known, strict=True) if one is None]
    quiet = not _is_first()
    shares = _in_every_process(lambda: list(measure_anew(process_share(missing), quiet=quiet).values()))
    new: dict[TrainedImage, Measured] = {}
    for number, share in enumerate(shares):
        new |= zip(missing[number :: len(shares)], share, strict=True)
    measurement_cache.add(keys, new)
    return {image: new[image] if one is None else one for image, one in zip(images, known, strict=True)}


def in_one_process(work: Callable[[], T]) -> T:
    """What the first process makes, in all of them.

    Args:
        work: what to do; the other processes wait.

    Raises:
        ConfigError: it has failed, and said why.
    """
    result: T | None = _in_every_process(lambda: work() if _is_first() else None)[0]
    return result  # type: ignore[return-value]


def _is_first() -> bool:
    return not there_are_several() or dist.get_rank() == 0


def _in_every_process(work: Callable[[], T]) -> list[T]:
    """What each process makes, in their order; where one of them fails, all do."""
    mine: T | None = None
    failed: Exception | None = None
    try:
        mine = work()
    except Exception as error:  # noqa: BLE001 - raised below, when the others know of it
        failed = error
    outcomes = gather((mine, None if failed is None else _told(failed)))
    if failed is not None:
        raise failed
    for _, message in outcomes:
        if message is not None:
            raise ConfigError(message)
    return [result for result, _ in outcomes]  # type: ignore[misc]


def _told(error: Exception) -> str:
    """An error as the other processes raise it."""
    return str(error) if isinstance(error, ConfigError) else f"another process stopped: {type(error).__name__}: {error}"
