"""Split, merge and shape bands."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..freq_loss_plugin.config import FreqLossConfig
from ..freq_loss_plugin.drawing import contrast_factor, show_difference
from ..freq_loss_plugin.shaping import merge_bands, scale_bands, split_bands
from .formats import AUTO, colors_of, format_input, latent_format, rgb
from .inputs import (
    band_options,
    check_unpacked,
    describe_bands,
    in_node_words,
    samples_of,
    shown,
    with_samples,
)
from .schema import schema, widget


class BandSplit(io.ComfyNode):
    """A latent's low and high band."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `freq_loss_plugin.shaping.split_bands`."""
        return schema(
            node_id="FreqLoss_BandSplit",
            display_name="Split Frequency Bands",
            description="Splits a latent into a low band (structure) and a high band (detail), exactly as the training "
            "loss does. The two add up to the latent.",
            search_aliases=["wavelet", "fft", "low pass", "high pass", "frequency separation"],
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to split. Image and video latents of every model."),
                *band_options(),
                format_input(AUTO, default=AUTO, optional=True, advanced=True,
                             tooltip="The model that the latent is from. Only the preview's colours depend on it."),
            ],
            outputs=[
                io.Latent.Output("low", display_name="low", tooltip="The low band: structure."),
                io.Latent.Output("high", display_name="high", tooltip="The high band: detail."),
                io.Image.Output("preview", display_name="preview",
                                tooltip="Original, low, high from left to right; high around grey, contrast scaled."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @in_node_words
    def execute(
        cls, samples: dict, method: str, wavelet: str, levels: int, cutoff: float, latent_format: str = AUTO
    ) -> io.NodeOutput:
        """Split, and draw a strip for each latent of the batch (of a video its first frame)."""
        config = FreqLossConfig(method=method, wavelet=wavelet, levels=levels, cutoff=cutoff)
        tensor = samples_of(samples, "samples")
        low, high = split_bands(tensor, config)
        strips, chosen, factor = _strips(tensor, low, latent_format)
        text = f"{describe_bands(config)}\nhigh × {factor:g}, {colors_of(latent_format, chosen)}"
        return shown(cls, with_samples(samples, low), with_samples(samples, high), strips, pictures=strips, text=text)


def _strips(tensor: Tensor, low: Tensor, name: str) -> tuple[Tensor, Any, float]:
    """IMAGE (B, H, 3·W, 3) of original, low and high; the format; the factor of the high band."""
    first, first_low = (each[:, :, 0] if each.ndim == 5 else each for each in (tensor, low))
    chosen = latent_format(name, tensor)
    original, structure = rgb(first, chosen), rgb(first_low, chosen)
    detail = original - structure
    factor = contrast_factor(detail)
    strip = torch.cat([original, structure, show_difference(detail, factor)], dim=-1)
    return strip.movedim(1, -1).cpu(), chosen, factor


class BandMerge(io.ComfyNode):
    """The sum of two bands with gains."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `freq_loss_plugin.shaping.merge_bands`."""
        return schema(
            node_id="FreqLoss_BandMerge",
            display_name="Merge Frequency Bands",
            description="low · low_gain + high · high_gain. With both gains at 1 it undoes the split.",
            search_aliases=["wavelet", "sharpen", "soften", "frequency separation"],
            inputs=[
                io.Latent.Input("low", tooltip="The low band. Its mask, if it has one, goes on to the output."),
                io.Latent.Input("high", tooltip="The high band, of the same shape as the low one."),
                _gain("low_gain", "Factor of the low band; 1 leaves it."),
                _gain("high_gain", "Factor of the high band; above 1 sharpens."),
            ],
            outputs=[io.Latent.Output("samples", display_name="samples", tooltip="The merged latent.")],
        )

    @classmethod
    @in_node_words
    def execute(cls, low: dict, high: dict, low_gain: float, high_gain: float) -> io.NodeOutput:
        """Merge; a batch of one goes with a batch of any size."""
        first, second = samples_of(low, "low"), samples_of(high, "high")
        batch = max(len(first), len(second))
        if len(first) != len(second) and 1 in (len(first), len(second)):
            first, second = (each.expand(batch, *each.shape[1:]) for each in (first, second))
        second = second.to(first)
        merged = merge_bands(first, second, low_gain, high_gain)
        return io.NodeOutput(with_samples({**high, **low}, merged))


class BandOperation(io.ComfyNode):
    """Gains for bands, as an operation that core's nodes apply while sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `freq_loss_plugin.shaping.scale_bands`."""
        return schema(
            node_id="FreqLoss_BandOperation",
            display_name="Frequency Band Operation",
            description="Scales the low and the high band of whatever it is applied to. For the core nodes "
            "LatentApplyOperation (a latent) and LatentApplyOperationCFG (the guidance, in every sampling step).",
            search_aliases=["latent operation", "sharpen", "detail", "wavelet"],
            inputs=[
                _gain("low_gain", "Factor of the low band; 1 leaves it."),
                _gain("high_gain", "Factor of the high band; above 1 gives more detail."),
                *band_options(),
            ],
            outputs=[
                io.LatentOperation.Output("operation", display_name="operation",
                                          tooltip="Connect it to LatentApplyOperation or LatentApplyOperationCFG."),
            ],
        )  # fmt: skip

    @classmethod
    @in_node_words
    def execute(
        cls, low_gain: float, high_gain: float, method: str, wavelet: str, levels: int, cutoff: float
    ) -> io.NodeOutput:
        """Return the operation; it is checked against a latent when it meets one."""
        config = FreqLossConfig(method=method, wavelet=wavelet, levels=levels, cutoff=cutoff)

        @in_node_words
        def operation(latent: Tensor, **_: Any) -> Tensor:
            check_unpacked(latent, "the latent")
            samples_of({"samples": latent}, "the latent")
            return scale_bands(latent, low_gain, high_gain, config)

        return io.NodeOutput(operation)


def _gain(name: str, tooltip: str) -> io.Input:
    return widget(io.Float, name, default=1.0, min=-10.0, max=10.0, step=0.01, tooltip=tooltip)
