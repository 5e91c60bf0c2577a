"""What several nodes share: the options of the bands, latents and pictures as tensors, texts under a node."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui
from torch import Tensor

from ..freq_loss_plugin.bands import METHODS, check_latent
from ..freq_loss_plugin.config import PREFIX, FreqLossConfig
from ..freq_loss_plugin.options import ConfigError
from ..freq_loss_plugin.wavelet_library import INSTALL_HINT, discrete_wavelets
from .schema import widget

P = ParamSpec("P")
R = TypeVar("R")

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


def samples_of(latent: dict[str, Any], name: str) -> Tensor:
    """The tensor of a LATENT, shape (B, C, H, W) or (B, C, T, H, W).

    Raises:
        ValueError: it is none, or of a kind without height and width (sound, for instance).
    """
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if getattr(samples, "is_nested", False) and not isinstance(samples, Tensor):
        raise ValueError(
            f"{name} holds several latents in one (video with sound, as LTX-2 has it): expected one of them; take it "
            "apart with Separate AV Latent (LTXVSeparateAVLatent) and connect the video"
        )
    if not isinstance(samples, Tensor):
        raise ValueError(f"{name} holds {type(samples).__name__}: expected a LATENT of pictures or video")
    _check_not_empty(samples, name)
    try:
        check_latent(samples, name)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return samples


def check_unpacked(latent: Tensor, name: str) -> None:
    """Check that a latent inside sampling is not several in one.

    Raises:
        ValueError: it is: ComfyUI packs those of video with sound into one row of numbers, shape (B, 1, N).
    """
    if latent.ndim == 3 and latent.shape[1] == 1:
        raise ValueError(
            f"{name} is video with sound (LTX-2, for instance), packed into a row of {latent.shape[-1]} numbers "
            "without height and width: frequency bands are not supported there"
        )


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
        content["text"] = (text,)  # web/js/node_text.js shows it
    return io.NodeOutput(*outputs, ui=content)


@functools.cache  # the list stands in many nodes, and a missing package is told once
def _wavelets() -> tuple[str, ...]:
    try:
        return discrete_wavelets()
    except ImportError as error:
        log.warning("freq_loss_plugin: no wavelet bands, fft bands are used (%s): %s", error, INSTALL_HINT)
        return ("haar", "db2", "db3", "db4", "sym4", "bior2.4")
