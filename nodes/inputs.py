"""What several nodes share: the inputs of the bands, latents and images as tensors, texts under a node."""

from __future__ import annotations

import functools
import logging
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui
from torch import Tensor

from ..freq_loss_plugin.loss.bands import METHODS, check_latent
from ..freq_loss_plugin.loss.params import BandSpec
from ..freq_loss_plugin.loss.wavelet_library import INSTALL_HINT, discrete_wavelets
from .schema import widget

log = logging.getLogger("freq_loss_plugin")


def band_inputs(*, advanced: bool = False) -> list[io.Input]:
    """The inputs method, wavelet, levels and cutoff."""
    return [
        widget(io.Combo, "method", options=list(METHODS), default="wavelet", advanced=advanced,
               tooltip="How the bands are computed: wavelet transform, or ideal low-pass filter (a disc in the "
               "Fourier spectrum)."),
        widget(io.Combo, "wavelet", options=list(_wavelet_names()), default="db3", advanced=True,
               tooltip="For wavelet: which wavelet to use. Training uses db3 by default."),
        widget(io.Int, "levels", default=2, min=1, max=8, advanced=True,
               tooltip="For wavelet: the number of decomposition levels; each one halves the low band. 2^levels must "
               "not exceed the shorter side."),
        widget(io.Float, "cutoff", default=0.25, min=0.01, max=0.5, step=0.01, advanced=True,
               tooltip="For fft: the radius of the low band as a fraction of the shorter side."),
    ]  # fmt: skip


def describe_bands(bands: BandSpec) -> str:
    """The bands in a few words, for headings."""
    if bands.resolved_method == "wavelet":
        return f"wavelet {bands.wavelet}, {bands.levels} level{'s' if bands.levels > 1 else ''}"
    missing = f" (no wavelets here: {INSTALL_HINT})" if bands.method == "wavelet" else ""
    return f"fft, cutoff {bands.cutoff:g}{missing}"


def latent_tensor(latent: dict[str, Any], name: str) -> Tensor:
    """The tensor of a LATENT, shape (B, C, H, W) or (B, C, T, H, W).

    Args:
        latent: the LATENT.
        name: how the error message calls it.

    Raises:
        ValueError: there is none, or it is of a kind without height and width (audio, for instance).
    """
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if getattr(samples, "is_nested", False) and not isinstance(samples, Tensor):
        raise ValueError(
            f"{name} holds several latents in one (video with audio, as in LTX-2): expected one of them; separate them "
            "with Separate AV Latent (LTXVSeparateAVLatent) and connect the video"
        )
    if not isinstance(samples, Tensor):
        raise ValueError(f"{name} holds {type(samples).__name__}: expected a LATENT of images or video")
    _check_not_empty(samples, name)
    try:
        check_latent(samples, name)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return samples


def check_not_packed(latent: Tensor, name: str) -> None:
    """Check that a latent inside sampling is not several in one.

    Raises:
        ValueError: it is: ComfyUI packs those of video with audio into one row of numbers, shape (B, 1, N).
    """
    if latent.ndim == 3 and latent.shape[1] == 1:
        raise ValueError(
            f"{name} is video with audio (LTX-2, for instance), packed into a row of {latent.shape[-1]} numbers "
            "without height and width: frequency bands are not supported there"
        )


def with_samples(latent: dict[str, Any], samples: Tensor) -> dict[str, Any]:
    """A new LATENT with other samples; the mask and everything else in it are kept."""
    return {**latent, "samples": samples}


def image_tensor(image: Tensor, name: str) -> Tensor:
    """An IMAGE (B, H, W, C) as (B, 3, H, W); an alpha channel is dropped, grayscale becomes RGB.

    Args:
        image: the IMAGE.
        name: how the error message calls it.

    Raises:
        ValueError: it has another shape.
    """
    if not isinstance(image, Tensor) or image.ndim != 4:
        actual = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        mask = "; a MASK becomes one with Convert Mask to Image" if getattr(image, "ndim", 0) == 3 else ""
        raise ValueError(f"{name} has {actual}: expected an IMAGE of shape (B, H, W, C){mask}")
    _check_not_empty(image, name)
    images = image.movedim(-1, 1)[:, :3]
    return images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)


def check_finite(tensor: Tensor, name: str) -> None:
    """Check that there is something to measure.

    Raises:
        ValueError: there is a NaN or an infinite value.
    """
    if not tensor.isfinite().all():
        raise ValueError(
            f"{name} holds NaN or infinite values, of which nothing can be measured: a VAE or a model that overflowed "
            "in fp16, often; start ComfyUI with --bf16-vae or --fp32-vae, or look at what comes before"
        )


def _check_not_empty(tensor: Tensor, name: str) -> None:
    if tensor.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} and is empty: expected at least one image")


class CancelableProgress:
    """A progress bar whose steps also check whether the user has canceled.

    Args:
        steps: how often `step` will be called.
    """

    def __init__(self, steps: int) -> None:
        self._bar = comfy.utils.ProgressBar(steps)

    def step(self) -> None:
        """Advance by one step.

        Raises:
            InterruptProcessingException: the user has canceled.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update(1)


def node_output(node: type[io.ComfyNode], *outputs: Any, images: Tensor | None = None, text: str = "") -> io.NodeOutput:
    """A node's outputs, with images and a text to show in the node.

    Args:
        node: the class of the node.
        outputs: in the order of its schema.
        images: shape (B, H, W, 3), 0..1; shown as a preview.
        text: shown under the node.
    """
    content: dict[str, Any] = {}
    if images is not None:
        content.update(ui.PreviewImage(images, cls=node).as_dict())
    if text:
        content["text"] = (text,)  # web/js/node_text.js shows it
    return io.NodeOutput(*outputs, ui=content)


@functools.cache  # many nodes have this list, and a missing package is reported once
def _wavelet_names() -> tuple[str, ...]:
    try:
        return discrete_wavelets()
    except ImportError as error:
        log.warning("freq_loss_plugin: no wavelet bands, fft bands are used (%s): %s", error, INSTALL_HINT)
        return ("haar", "db2", "db3", "db4", "sym4", "bior2.4")
