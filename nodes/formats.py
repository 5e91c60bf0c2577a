"""Latent formats: which model a LATENT belongs to, its scale, and its approximate colors."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import torch
from comfy_api.latest import io
from torch import Tensor

from .schema import widget

AUTO = "auto"
ALREADY_SCALED = "none (already scaled)"

# The labels are saved in people's workflows and never change. Of several with the same number of channels, auto takes
# the first. Those that the installed ComfyUI does not have are left out.
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
    "Qwen-Image 2.1": "QwenImage21",
    "Ming-Image": "MingImage",
}


def _available_formats() -> dict[str, str]:
    """Label to class name: the formats labeled above, then every other one that ComfyUI itself can preview.

    Formats without colors are those of audio and of 3-D shapes; one with as many factors as another has channels is a
    pack of several streams; a class that defines nothing is another one under a new name.
    """
    classes = {name: value for name, value in vars(comfy.latent_formats).items() if _is_format(value)}
    labeled = {label: name for label, name in _LABELS.items() if name in classes}
    others = (name for name in classes if name not in labeled.values() and _has_colors(classes[name]))
    return labeled | {name: name for name in others}


def _is_format(value: Any) -> bool:
    base = comfy.latent_formats.LatentFormat
    if not isinstance(value, type) or not issubclass(value, base) or value is base:
        return False
    return any(not name.startswith("__") or name == "__init__" for name in vars(value))


def _has_colors(format_class: Any) -> bool:
    try:
        instance = format_class()
    except TypeError:  # a format that needs arguments cannot be selected by the number of channels
        return False
    factors = instance.latent_rgb_factors
    return factors is not None and (len(factors) == instance.latent_channels or _reshape(instance) is not None)


def _reshape(selected: Any) -> Any:
    """How channels are rearranged before the colors are computed; ComfyUI has this from 0.3.76 on."""
    return getattr(selected, "latent_rgb_factors_reshape", None)


FORMATS = _available_formats()


def format_input(*choices: str, **options: Any) -> io.Input:
    """A list of latent formats, after ``choices``."""
    return widget(io.Combo, "latent_format", options=[*choices, *FORMATS], **options)


def select_format(choice: str, latents: Tensor) -> Any | None:
    """The format called ``choice``, or with auto one with as many channels; None where there is none.

    With 4 or 16 channels auto takes the first of the list, otherwise one of images for images and of video for video.

    Args:
        choice: an entry of the list, `AUTO` or `ALREADY_SCALED`.
        latents: shape (B, C, H, W) or (B, C, T, H, W).

    Raises:
        ValueError: the format has another number of channels.
    """
    if choice == ALREADY_SCALED:
        return None
    channels = latents.shape[1]
    if choice == AUTO:
        candidates = _formats_with(channels)
        if channels not in (4, 16):
            same_dimensions = [entry for entry in candidates if entry.latent_dimensions == latents.ndim - 2]
            candidates = same_dimensions or candidates
        return next(iter(candidates), None)
    selected = _make_format(choice)
    if selected.latent_channels != channels:
        names = [format_label(entry) for entry in _formats_with(channels)]
        fix = f"choose {' or '.join(names)}" if names else f"choose {AUTO} or {ALREADY_SCALED}, where available"
        raise ValueError(
            f"latent_format {choice} has {selected.latent_channels} channels, and this latent has {channels}; {fix}"
        )
    return selected


def format_label(selected: Any | None) -> str:
    """The label of a format in the list."""
    labels = {class_name: label for label, class_name in FORMATS.items()}
    return labels.get(type(selected).__name__, "mean of the channels")


def describe_colors(choice: str, selected: Any | None) -> str:
    """Where the colors of a preview come from, for headings.

    Args:
        choice: the entry of the list that the user has chosen.
        selected: the format that `select_format` returned for it.
    """
    label = f"colors: {format_label(selected)}"
    if choice != AUTO or selected is None:
        return label
    alike = len(_formats_with(selected.latent_channels))
    if alike == 1:
        return label
    return f"{label} (guessed: {alike} formats have {selected.latent_channels} channels; choose one in latent_format)"


def to_model_scale(latents: Tensor, selected: Any | None) -> Tensor:
    """Latents in the scale in which the model sees them; video formats also take images, and the reverse."""
    if selected is None:
        return latents
    if selected.latent_dimensions == 3 and latents.ndim == 4:
        return selected.process_in(latents.unsqueeze(2)).squeeze(2)
    if selected.latent_dimensions == 2 and latents.ndim == 5:
        # Frame by frame: values for each channel have the shape (1, C, 1, 1).
        return torch.stack([selected.process_in(frame) for frame in latents.unbind(2)], dim=2)
    return selected.process_in(latents)


def latent_to_rgb(latents: Tensor, selected: Any | None) -> Tensor:
    """Latents (B, C, H, W) as small images (B, 3, H, W), 0..1, by the format's linear map from channels to colors.

    As in ComfyUI's own previews, the map applies to latents in the model's scale. FLUX.2, whose channels are blocks of
    2 × 2 pixels, gets twice the resolution.
    """
    if selected is None or selected.latent_rgb_factors is None:
        # No map: the mean of the channels, stretched to the full range of grays.
        gray = latents.float().mean(dim=1, keepdim=True)
        low, high = gray.amin(dim=(-2, -1), keepdim=True), gray.amax(dim=(-2, -1), keepdim=True)
        return ((gray - low) / (high - low).clamp(min=1e-8)).expand(-1, 3, -1, -1)
    latents = to_model_scale(latents.float(), selected)
    reshape = _reshape(selected)
    if reshape is not None:
        latents = reshape(latents)
    factors = torch.tensor(selected.latent_rgb_factors, device=latents.device)
    colors = torch.einsum("bchw,cr->brhw", latents, factors)
    if selected.latent_rgb_factors_bias is not None:
        colors = colors + torch.tensor(selected.latent_rgb_factors_bias, device=latents.device).view(1, 3, 1, 1)
    return ((colors + 1) / 2).clamp(0, 1)


def _formats_with(channels: int) -> list[Any]:
    return [entry for entry in map(_make_format, FORMATS) if entry.latent_channels == channels]


def _make_format(label: str) -> Any:
    return getattr(comfy.latent_formats, FORMATS[label])()
