"""Latent formats: which model a LATENT is from, its scale, and its approximate colors."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import torch
from comfy_api.latest import io
from torch import Tensor

from .schema import widget

AUTO = "auto"
SCALED = "none (already scaled)"

# The labels stand in people's workflows and never change. Where several have the same number of channels, auto takes
# the first.
_LABELS = {
    "SD1.x": "SD15",
    "SDXL": "SDXL",
    "FLUX": "Flux",
    "SD3": "SD3",
    "Wan 2.1 / Qwen-Image": "Wan21",
    "HunyuanVideo": "HunyuanVideo",
    "HunyuanImage 2.1": "HunyuanImage21",
    "Wan 2.2": "Wan22",
    "LTX-Video": "LTXV",
    "Mochi": "Mochi",
    "Cosmos": "Cosmos1CV8x8x8",
    "Playground 2.5": "SDXL_Playground_2_5",
    "Stable Cascade B": "SC_B",
    "Stable Cascade C": "SC_Prior",
    "pixel space": "ChromaRadiance",
    "FLUX.2": "Flux2",
    "HunyuanVideo 1.5": "HunyuanVideo15",
    "LTX-2": "LTXAV",
    "MiniMax H3": "MiniMaxH3Video",
    "CogVideoX": "CogVideoX",
    "CogVideoX 1.5": "CogVideoX1_5",
}


def _offered() -> dict[str, str]:
    """Label to class: those labelled above, then every other one that ComfyUI itself can draw.

    Formats without colors are those of sound and of 3-D shapes; one with as many factors as another has channels is a
    pack of several streams; one that defines nothing is another under a new name.
    """
    known = {name: kind for name, kind in vars(comfy.latent_formats).items() if _is_format(kind)}
    labels = {label: name for label, name in _LABELS.items() if name in known}
    others = (name for name in known if name not in labels.values() and _has_colors(known[name]))
    return labels | {name: name for name in others}


def _is_format(kind: Any) -> bool:
    base = comfy.latent_formats.LatentFormat
    own = isinstance(kind, type) and any(not name.startswith("__") or name == "__init__" for name in vars(kind))
    return own and issubclass(kind, base) and kind is not base


def _has_colors(kind: Any) -> bool:
    try:
        made = kind()
    except TypeError:  # one that needs arguments is none that a latent's channels could choose
        return False
    factors = made.latent_rgb_factors
    return factors is not None and (len(factors) == made.latent_channels or _reshape(made) is not None)


def _reshape(chosen: Any) -> Any:
    """How channels are rearranged before the colors are made; ComfyUI has this from 0.3.76 on."""
    return getattr(chosen, "latent_rgb_factors_reshape", None)


FORMATS = _offered()


def format_input(*choices: str, **options: Any) -> io.Input:
    """A list of latent formats, after ``choices``."""
    return widget(io.Combo, "latent_format", options=[*choices, *FORMATS], **options)


def latent_format(name: str, samples: Tensor) -> Any | None:
    """The format called ``name``, or with auto one with as many channels; None where there is none.

    With 4 or 16 channels auto takes the first of the list, otherwise one of images for images and of video for video.

    Args:
        name: an entry of the list, `AUTO` or `SCALED`.
        samples: the latent, shape (B, C, H, W) or (B, C, T, H, W).

    Raises:
        ValueError: the format has another number of channels.
    """
    if name == SCALED:
        return None
    channels = samples.shape[1]
    if name == AUTO:
        fitting = _with_channels(channels)
        alike = [each for each in fitting if each.latent_dimensions == samples.ndim - 2]
        return next(iter(alike or fitting if channels not in (4, 16) else fitting), None)
    chosen = _make_format(name)
    if chosen.latent_channels != channels:
        names = [format_name(each) for each in _with_channels(channels)]
        instead = f"choose {' or '.join(names)}" if names else f"choose {AUTO} or {SCALED}, where offered"
        raise ValueError(
            f"latent_format {name} has {chosen.latent_channels} channels, and this latent has {channels}; {instead}"
        )
    return chosen


def format_name(chosen: Any | None) -> str:
    """The name of a format as the list has it."""
    known = {of_comfy: name for name, of_comfy in FORMATS.items()}
    return known.get(type(chosen).__name__, "mean of the channels")


def colors_of(name: str, chosen: Any | None) -> str:
    """Where the colors of a preview come from, for headings.

    Args:
        name: what was asked for.
        chosen: what `latent_format` made of it.
    """
    guessed = name == AUTO and chosen is not None and len(_with_channels(chosen.latent_channels)) > 1
    return f"colors: {format_name(chosen)}{' (guessed)' if guessed else ''}"


def scaled(samples: Tensor, chosen: Any | None) -> Tensor:
    """Latents in the scale in which the model sees them; video formats take images, too."""
    if chosen is None:
        return samples
    if chosen.latent_dimensions == 3 and samples.ndim == 4:
        return chosen.process_in(samples.unsqueeze(2)).squeeze(2)
    return chosen.process_in(samples)


def rgb(samples: Tensor, chosen: Any | None) -> Tensor:
    """Latents (B, C, H, W) as small images (B, 3, H, W), 0..1, by the format's linear map from channels to colors.

    As ComfyUI's own previews do it: the map belongs to latents in the model's scale. FLUX.2, whose channels hold 2 × 2
    places each, gets twice as many pixels.
    """
    if chosen is None or chosen.latent_rgb_factors is None:
        # No map: the mean of the channels, spread over the grays.
        gray = samples.float().mean(dim=1, keepdim=True)
        low, high = gray.amin(dim=(-2, -1), keepdim=True), gray.amax(dim=(-2, -1), keepdim=True)
        return ((gray - low) / (high - low).clamp(min=1e-8)).expand(-1, 3, -1, -1)
    latents = scaled(samples.float(), chosen)
    reshape = _reshape(chosen)
    if reshape is not None:
        latents = reshape(latents)
    factors = torch.tensor(chosen.latent_rgb_factors, device=latents.device)
    colors = torch.einsum("bchw,cr->brhw", latents, factors)
    if chosen.latent_rgb_factors_bias is not None:
        colors = colors + torch.tensor(chosen.latent_rgb_factors_bias, device=latents.device).view(1, 3, 1, 1)
    return ((colors + 1) / 2).clamp(0, 1)


def _with_channels(channels: int) -> list[Any]:
    return [each for each in map(_make_format, FORMATS) if each.latent_channels == channels]


def _make_format(name: str) -> Any:
    return getattr(comfy.latent_formats, FORMATS[name])()
