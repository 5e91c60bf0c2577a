"""Image quality in a training program: what is known of a run's images, and the least timesteps of a batch.

Every process measures its share of the images. What is wrong with them is the same in all afterward.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from freq_loss_plugin.image_quality.survey import Measured, Size, Survey, measure_all
from freq_loss_plugin.training.distributed import gather, process_share

from .protocols import IMAGES, Batch

OPTION = "freq_loss_image_quality"


class ImageQuality:
    """What is known of the images of one run.

    Args:
        survey: the result for all images.
        names: what the batches call each image; its path where left out.
    """

    def __init__(self, survey: Survey, names: Mapping[str, Path] | None = None) -> None:
        self.survey = survey
        names = {str(image): image for image in survey.least} if names is None else names
        self._least = {name: survey.least[image] for name, image in names.items() if image in survey.least}

    def least_of(self, batch: Batch) -> Tensor | None:
        """The least timesteps of a batch's samples, shape (B,), on the CPU; None where none has one."""
        least = [self._least.get(name, 0) for name in batch[IMAGES]]
        return torch.tensor(least) if any(least) else None


def measure_together(images: Mapping[Path, Size]) -> dict[Path, Measured]:
    """Each process measures its share of the images; the result is that of all."""
    shares = gather(measure_all({image: images[image] for image in process_share(sorted(images))}))
    return {image: found for share in shares for image, found in share.items()}
