"""A frequency-aware distribution-matching loss for training diffusion LoRAs.

Plain torch: this package knows neither sd-scripts nor ComfyUI. Read it in this order: `bands`, `latents`, `loss`,
`config`.
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
