"""Image quality in sd-scripts: what the run's own VAE makes of the defects of its images."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from freq_loss_plugin import ConfigError, FreqLossConfig
from freq_loss_plugin.image_folders import SOURCES, find_images
from freq_loss_plugin.image_quality.noise_schedules import signal_to_noise, stable_diffusion_alphas
from freq_loss_plugin.image_quality.old_caches import warn_of_old
from freq_loss_plugin.image_quality.pixels import as_pixels
from freq_loss_plugin.image_quality.survey import survey
from freq_loss_plugin.image_quality.trained_image import TrainedImage
from freq_loss_plugin.loss.latents import NUM_TRAIN_TIMESTEPS
from freq_loss_plugin.options.image_rules import rules_by_image
from freq_loss_plugin.training.random_streams import separate_random_stream

from ..image_quality import OPTION, ImageQuality, in_one_process, measure_together
from . import image_names
from .trainers import TrainingRun

_REMEDY = "set freq_loss_image_quality = 'off' and remove [freq_loss.image_quality]"


def check(config: FreqLossConfig, args: argparse.Namespace) -> None:
    """Check that the folders of the rules are those of images; by names alone, so before anything is loaded.

    Raises:
        ConfigError: a rule is for a folder in which there is no image.
    """
    # The images of a data set class of the user's own are known to its code alone.
    if config.image_rules and not getattr(args, "dataset_class", None):
        rules_by_image(config.image_rules, find_images(**{name: getattr(args, name, None) for name in SOURCES}))


def make_quality(run: TrainingRun, config: FreqLossConfig, vae: Any) -> ImageQuality:
    """What is known of the images of a run, whose data sets will name the images of a batch.

    Args:
        run: the run in progress.
        config: the options.
        vae: the model's, as ``create_network`` gets it; on whatever device.

    Raises:
        ConfigError: see `freq_loss_plugin.image_quality.survey.survey`; also where a data set of the user's own class
            does not say which images its batches hold, or the VAE cannot be used.
    """
    image_names.check(run.datasets, OPTION, _REMEDY)
    args = run.args
    prediction_type = run.family.prediction_type(args)
    alphas = stable_diffusion_alphas(zero_terminal_snr=bool(getattr(args, "zero_terminal_snr", False)))
    infos = [info for dataset in run.datasets for info in dataset.image_data.values()]
    named = [(image_names.name_of(info), info) for info in infos]
    names = {name: TrainedImage(Path(info.absolute_path), image_names.size_of(info)) for name, info in named}
    repeats: Counter[str] = Counter()
    for name, info in named:
        repeats[name] += info.num_repeats
    encoder = _Encoder(run, vae)
    with encoder.restoring():
        found = survey(
            names.values(),
            config,
            encoder.encode,
            signal_to_noise(prediction_type, alphas),
            end=getattr(args, "max_timestep", None) or NUM_TRAIN_TIMESTEPS,
            measure=measure_together,
            once=in_one_process,
        )
    caches = {info.latents_npz: info.absolute_path for info in infos if getattr(info, "latents_npz", None)}
    old = warn_of_old({Path(cache): Path(image) for cache, image in caches.items()})
    image_names.add_to(run.datasets)
    return ImageQuality(found.with_warnings(old), names, repeats)


class _Encoder:
    """Encodes images as the trainer does.

    Args:
        run: the run in progress.
        vae: the model's.
    """

    def __init__(self, run: TrainingRun, vae: Any) -> None:
        from accelerate import PartialState  # noqa: PLC0415 - as in `trainers`

        self._trainer: Any = run.trainer
        self._args, self._vae, self._device = run.args, vae, PartialState().device

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Leave the VAE on the device where it was; the process that encodes has it on the training device."""
        if not isinstance(self._vae, torch.nn.Module):
            yield
            return
        was = next(self._vae.parameters()).device
        try:
            yield
        finally:
            self._vae.to(was)

    @torch.no_grad()
    def encode(self, image: Image.Image) -> Tensor:
        """The latents of an image, shape (C, H, W), scaled as for the model; the same noise each time."""
        if not isinstance(self._vae, torch.nn.Module):
            raise ConfigError(
                f"{OPTION}: needs the VAE to compare images, and sd-scripts gave {type(self._vae).__name__} to the "
                "network module; set least timesteps by hand in [freq_loss.image_quality]"
            )
        self._vae.to(self._device)
        pixels = (as_pixels(image)[None] * 2 - 1).to(self._device, next(self._vae.parameters()).dtype)
        with separate_random_stream(OPTION, self._device):
            latents = self._trainer.encode_images_to_latents(self._args, self._vae, pixels)
        latents = self._trainer.shift_scale_latents(self._args, latents).float()
        if not latents.isfinite().all():
            raise ConfigError(
                f"{OPTION}: the VAE returns NaN in {pixels.dtype}; train with no_half_vae, or with a VAE that works "
                "in half precision"
            )
        return latents[0]
