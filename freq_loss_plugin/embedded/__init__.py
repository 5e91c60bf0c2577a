"""A small model, captioned pictures that the project draws itself, and instruments that read them back.

Structure (shape, colour, position, background) and texture (kind, period) are drawn independently, so that for every
picture it is known what belongs to the low band and what to the high one. Read `pictures`, then `attributes`.
"""

from __future__ import annotations

from pathlib import Path

from ..options import ConfigError


def model_folder() -> Path:
    """The embedded model: a latent diffusion model in diffusers layout with SD1.5's topology and narrower widths.

    Raises:
        ConfigError: it is not there.
    """
    installed, cloned = Path(__file__).parent / "tiny_sd", Path(__file__).parents[2] / "assets" / "tiny_sd"
    for folder in (cloned, installed):
        if (folder / "model_index.json").is_file():
            return folder
    raise ConfigError(f"the embedded model is neither at {cloned} nor at {installed}; clone the repository again")
