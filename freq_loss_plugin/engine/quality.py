"""What the VAE of a run makes of the defects of its images; see `freq_loss_plugin.image_quality`."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from ..image_quality.noise_schedules import signal_to_noise
from ..image_quality.pixels import as_pixels
from ..image_quality.survey import Survey, survey
from ..image_quality.trained_image import TrainedImage
from ..loss.latents import NUM_TRAIN_TIMESTEPS
from ..options.config import FreqLossConfig
from .dataset import DataSet, resized_size
from .model import Model
from .settings import Settings


def survey_images(settings: Settings, loss: FreqLossConfig, data: DataSet, model: Model) -> Survey:
    """Measure the training images, and find out how their latents are restored and from which timestep on they train.

    Raises:
        ConfigError: see `freq_loss_plugin.image_quality.survey.survey`.
    """

    @torch.no_grad()
    def encode(image: Image.Image) -> Tensor:
        vae = model.pipeline.vae
        pixels = as_pixels(image)[None] * 2 - 1
        latents: Tensor = vae.encode(pixels.to(model.device, vae.dtype)).latent_dist.mean
        return latents[0] * vae.config.scaling_factor

    return survey(
        [TrainedImage(example.file, resized_size(example)) for example in data.examples],
        loss,
        encode,
        signal_to_noise(settings.prediction_type, model.scheduler.alphas_cumprod),
        end=settings.max_timestep or NUM_TRAIN_TIMESTEPS,
    )
