"""A frequency-aware distribution-matching loss for training diffusion LoRAs.

This package depends on neither sd-scripts nor ComfyUI. Suggested reading order: `loss` (the equations, in plain torch),
`options` (what users set), `training` (what every trainer needs around the loss); then `analysis`, `lora` and
`guidance_token`, for ComfyUI's nodes and the trainers; `toy_model`, a small model and images to try it on; `engine`, a
small trainer on diffusers.
"""

from .loss.bands import Bands, frequency_decomposition
from .loss.latents import recover_latent
from .loss.matching import frequency_matching_loss
from .loss.params import BandSpec, FrequencyLoss, LossSpec
from .loss.reference import reference_loss
from .options.config import FreqLossConfig
from .options.fields import ConfigError
from .version import __version__

__all__ = [
    "BandSpec",
    "Bands",
    "ConfigError",
    "FreqLossConfig",
    "FrequencyLoss",
    "LossSpec",
    "__version__",
    "frequency_decomposition",
    "frequency_matching_loss",
    "recover_latent",
    "reference_loss",
]
