"""A frequency-aware distribution-matching loss for training diffusion LoRAs.

Plain torch: this package knows neither sd-scripts nor ComfyUI. Read it in this order: `bands`, `latents`, `loss`,
`config` (on `options`); then what a trainer needs around them, `step` and `report`, and what ComfyUI's nodes do,
`shaping`, `spectra`, `drawing`, `lora_info` and `lora_branch`. `embedded` is a small model and pictures to try it on;
`engine` is a small trainer, and the only part that needs much more than torch.
"""

from .bands import Bands, frequency_decomposition
from .config import FreqLossConfig
from .latents import recover_latent
from .loss import FrequencyLoss, frequency_matching_loss, reference_loss
from .options import ConfigError
from .version import __version__

__all__ = [
    "Bands",
    "ConfigError",
    "FreqLossConfig",
    "FrequencyLoss",
    "__version__",
    "frequency_decomposition",
    "frequency_matching_loss",
    "recover_latent",
    "reference_loss",
]
