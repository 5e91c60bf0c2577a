"""A toy diffusion model, synthetic captioned images (`scenes`), and the measurement of what they show (`attributes`).

Structure (shape, color, position, background) and texture (kind, period) are drawn independently, so that for every
image it is known what belongs to the low band and what to the high band.
"""

from __future__ import annotations

from pathlib import Path

from ..options.fields import ConfigError


def model_folder() -> Path:
    """The folder of the toy model: a latent diffusion model in diffusers layout, SD1.5 with narrower layers.

    Raises:
        ConfigError: the folder is missing.
    """
    installed, cloned = Path(__file__).parent / "tiny_sd", Path(__file__).parents[2] / "assets" / "tiny_sd"
    for folder in (cloned, installed):
        if (folder / "model_index.json").is_file():
            return folder
    raise ConfigError(f"the toy model is neither at {cloned} nor at {installed}; clone the repository again")
