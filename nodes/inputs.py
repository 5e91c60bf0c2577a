"""What several nodes share: the options of the bands, latents and pictures as tensors, formats, texts under a node."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import comfy.latent_formats
import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..freq_loss_plugin.bands import METHODS, check_latent
from ..freq_loss_plugin.config import PREFIX, FreqLossConfig
from ..freq_loss_plugin.options import ConfigError
from ..freq_loss_plugin.wavelet_library import INSTALL_HINT, discrete_wavelets
from .schema import widget

P = ParamSpec("P")
R = TypeVar("R")

AUTO = "auto"
SCALED = "none (already scaled)"

# What a LATENT is from does not stand in it. Where several have the same number of channels, auto takes the first.
_FORMATS = {
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
}
FORMATS = {name: known for name, known in _FORMATS.items() if hasattr(comfy.latent_formats, known)}

log = logging.getLogger("freq_loss_plugin")


def band_options(*, advanced: bool = False) -> list[io.Input]:
    """The inputs method, wavelet, levels and cutoff."""
    return [
        widget(io.Combo, "method", options=list(METHODS), default="wavelet", advanced=advanced,
               tooltip="How the bands are made: wavelet transform, or a disc in the Fourier spectrum."),
        widget(io.Combo, "wavelet", options=list(_wavelets()), default="db3", advanced=True,
               tooltip="Method wavelet: which wavelet. Training uses db3 unless told otherwise."),
        widget(io.Int, "levels", default=2, min=1, max=8, advanced=True,
               tooltip="Method wavelet: how often the low band is halved. 2^levels must fit into the smaller side."),
        widget(io.Float, "cutoff", default=0.25, min=0.01, max=0.5, step=0.01, advanced=True,
               tooltip="Method fft: radius of the low band as a fraction of the smaller side."),
    ]  # fmt: skip


def in_node_words(function: Callable[P, R]) -> Callable[P, R]:
    """Let a node tell what is wrong with an option by the name that the option has in the node."""

    @functools.wraps(function)
    def told(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return function(*arguments, **named)
        except ConfigError as error:
            raise ValueError(str(error).replace(PREFIX, "")) from None

    return told


def describe_bands(config: FreqLossConfig) -> str:
    """The bands in a few words, for headings."""
    if config.resolved_method == "wavelet":
        return f"wavelet {config.wavelet}, {config.levels} level{'s' if config.levels > 1 else ''}"
    missing = f" (no wavelets here: {INSTALL_HINT})" if config.method == "wavelet" else ""
    return f"fft, cutoff {config.cutoff:g}{missing}"


def format_input(*choices: str, **options: Any) -> io.Input:
    """A list of latent formats, after ``choices``."""
    return widget(io.Combo, "latent_format", options=[*choices, *FORMATS], **options)


def latent_format(name: str, channels: int) -> Any | None:
    """The format called ``name``, or with auto the first with that many channels; None where there is none.

    Raises:
        ValueError: the format has another number of channels.
    """
    if name == SCALED:
        return None
    if name == AUTO:
        made = (_make_format(each) for each in FORMATS)
        return next((each for each in made if each.latent_channels == channels), None)
    chosen = _make_format(name)
    if chosen.latent_channels != channels:
        fitting = [each for each in FORMATS if _make_format(each).latent_channels == channels]
        instead = f"choose {' or '.join(fitting)}" if fitting else f"choose {AUTO} or {SCALED}, where offered"
        raise ValueError(
            f"latent_format {name} has {chosen.latent_channels} channels, and this latent has {channels}; {instead}"
        )
    return chosen


def format_name(chosen: Any | None) -> str:
    """The name of a format as the list has it."""
    known = {of_comfy: name for name, of_comfy in FORMATS.items()}
    return known.get(type(chosen).__name__, "mean of the channels")


def samples_of(latent: dict[str, Any], name: str) -> Tensor:
    """The tensor of a LATENT, shape (B, C, H, W) or (B, C, T, H, W).

    Raises:
        ValueError: it is none, or of a kind without height and width (sound, for instance).
    """
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if not isinstance(samples, Tensor):
        raise ValueError(f"{name} holds {type(samples).__name__}: expected a LATENT of pictures or video")
    _check_not_empty(samples, name)
    try:
        check_latent(samples, name)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return samples


def with_samples(latent: dict[str, Any], samples: Tensor) -> dict[str, Any]:
    """A new LATENT with other samples; the mask and whatever else it holds stay."""
    return {**latent, "samples": samples}


def pictures_of(image: Tensor, name: str) -> Tensor:
    """An IMAGE (B, H, W, C) as (B, 3, H, W); an alpha channel is left out, grey becomes RGB.

    Raises:
        ValueError: another shape.
    """
    if not isinstance(image, Tensor) or image.ndim != 4:
        got = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"{name} has {got}: expected an IMAGE of shape (B, H, W, C)")
    _check_not_empty(image, name)
    pictures = image.movedim(-1, 1)[:, :3]
    return pictures if pictures.shape[1] == 3 else pictures[:, :1].expand(-1, 3, -1, -1)


def _check_not_empty(tensor: Tensor, name: str) -> None:
    if tensor.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} and is empty: expected at least one picture")


def rgb(samples: Tensor, chosen: Any | None) -> Tensor:
    """Latents (B, C, H, W) as small pictures (B, 3, H, W), 0..1, by the format's linear map from channels to colours.

    As ComfyUI's own previews do it: the map belongs to latents in the model's scale.
    """
    if chosen is None or chosen.latent_rgb_factors is None:
        # No map: the mean of the channels, spread over the greys.
        grey = samples.float().mean(dim=1, keepdim=True)
        low, high = grey.amin(dim=(-2, -1), keepdim=True), grey.amax(dim=(-2, -1), keepdim=True)
        return ((grey - low) / (high - low).clamp(min=1e-8)).expand(-1, 3, -1, -1)
    scaled = chosen.process_in(samples.float())
    factors = torch.tensor(chosen.latent_rgb_factors, device=scaled.device)
    colours = torch.einsum("bchw,cr->brhw", scaled, factors)
    if chosen.latent_rgb_factors_bias is not None:
        colours = colours + torch.tensor(chosen.latent_rgb_factors_bias, device=scaled.device).view(1, 3, 1, 1)
    return ((colours + 1) / 2).clamp(0, 1)


class Work:
    """A progress bar that also looks whether the user has cancelled."""

    def __init__(self, steps: int) -> None:
        self._bar = comfy.utils.ProgressBar(steps)

    def step(self) -> None:
        """One more is done.

        Raises:
            InterruptProcessingException: the user has cancelled.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update(1)


def shown(node: type[io.ComfyNode], *outputs: Any, pictures: Tensor | None = None, text: str = "") -> io.NodeOutput:
    """Outputs, with pictures and a text shown in the node."""
    content: dict[str, Any] = {}
    if pictures is not None:
        content.update(ui.PreviewImage(pictures, cls=node).as_dict())
    if text:
        content["text"] = (text,)
        _send_text(node, text)
    return io.NodeOutput(*outputs, ui=content)


def _send_text(node: type[io.ComfyNode], text: str) -> None:
    """Show a text in the node while it is open in a browser."""
    # Where nodes run without the server (ComfyUI as a library), there is no such module, and nobody to show it to.
    prompt_server = getattr(sys.modules.get("server"), "PromptServer", None)
    server = getattr(prompt_server, "instance", None)
    if server is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, node.hidden.unique_id)


@functools.cache  # the list stands in many nodes, and a missing package is told once
def _wavelets() -> tuple[str, ...]:
    try:
        return discrete_wavelets()
    except ImportError as error:
        log.warning("freq_loss_plugin: no wavelet bands, fft bands are used (%s): %s", error, INSTALL_HINT)
        return ("haar", "db2", "db3", "db4", "sym4", "bior2.4")


def _make_format(name: str) -> Any:
    return getattr(comfy.latent_formats, FORMATS[name])()
