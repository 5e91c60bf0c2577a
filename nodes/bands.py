"""Split, merge and scale bands."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..freq_loss_plugin.analysis.figures import contrast_factor, difference_image
from ..freq_loss_plugin.analysis.mixing import merge_bands, scale_bands
from ..freq_loss_plugin.loss.bands import Method
from ..freq_loss_plugin.loss.params import BandSpec
from .formats import AUTO, describe_colors, format_input, latent_to_rgb, select_format
from .inputs import band_inputs, check_not_packed, describe_bands, latent_tensor, node_output, with_samples
from .schema import schema, widget


class BandSplit(io.ComfyNode):
    """A latent's low and high band."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `freq_loss_plugin.loss.params.BandSpec.split`."""
        return schema(
            node_id="FreqLoss_BandSplit",
            display_name="Split Frequency Bands",
            description="Splits a latent into a low band (structure) and a high band (detail), exactly as the training "
            "loss does. The two add up to the latent.",
            search_aliases=["wavelet", "fft", "low pass", "high pass", "frequency separation"],
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to split. Image and video latents of any model."),
                *band_inputs(),
                format_input(AUTO, default=AUTO, optional=True, advanced=True,
                             tooltip="The model that the latent belongs to. Affects only the colors of the preview."),
            ],
            outputs=[
                io.Latent.Output("low", display_name="low", tooltip="The low band: structure."),
                io.Latent.Output("high", display_name="high", tooltip="The high band: detail."),
                io.Image.Output("preview", display_name="preview",
                                tooltip="Original, low, high from left to right; high is centered on gray, with its "
                                "contrast stretched."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, samples: dict, method: Method, wavelet: str, levels: int, cutoff: float, latent_format: str = AUTO
    ) -> io.NodeOutput:
        """Split, and draw a strip for each latent of the batch (of a video its first frame)."""
        bands = BandSpec(method, wavelet, levels, cutoff)
        latents = latent_tensor(samples, "samples")
        low, high = bands.split(latents)
        strips, colors, factor = _preview_strips(latents, low, latent_format)
        text = f"{describe_bands(bands)}\nhigh × {factor:g}, {colors}"
        outputs = with_samples(samples, low), with_samples(samples, high), strips
        return node_output(cls, *outputs, images=strips, text=text)


def _preview_strips(latents: Tensor, low: Tensor, format_choice: str) -> tuple[Tensor, str, float]:
    """IMAGE (B, H, 3·W, 3) of original, low and high; a description of the colors; the factor of the high band."""
    selected = select_format(format_choice, latents)
    if latents.ndim == 5:
        latents, low = latents[:, :, 0], low[:, :, 0]
    original, structure = latent_to_rgb(latents, selected), latent_to_rgb(low, selected)
    detail = original - structure
    factor = contrast_factor(detail)
    strips = torch.cat([original, structure, difference_image(detail, factor)], dim=-1)
    return strips.movedim(1, -1).cpu(), describe_colors(format_choice, selected), factor


class BandMerge(io.ComfyNode):
    """The sum of two bands with gains."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `freq_loss_plugin.analysis.mixing.merge_bands`."""
        return schema(
            node_id="FreqLoss_BandMerge",
            display_name="Merge Frequency Bands",
            description="low · low_gain + high · high_gain. With both gains at 1 it undoes the split.",
            search_aliases=["wavelet", "sharpen", "soften", "frequency separation"],
            inputs=[
                io.Latent.Input("low", tooltip="The low band. Its mask, if any, is passed on to the output."),
                io.Latent.Input("high", tooltip="The high band, of the same shape as the low one."),
                _gain_input("low_gain", "Gain of the low band; 1 leaves it unchanged."),
                _gain_input("high_gain", "Gain of the high band; above 1 sharpens."),
            ],
            outputs=[io.Latent.Output("samples", display_name="samples", tooltip="The merged latent.")],
        )

    @classmethod
    def execute(cls, low: dict, high: dict, low_gain: float, high_gain: float) -> io.NodeOutput:
        """Merge; a batch of one is broadcast to a batch of any size."""
        low_band, high_band = latent_tensor(low, "low"), latent_tensor(high, "high")
        if len(low_band) != len(high_band) and 1 in (len(low_band), len(high_band)):
            batch = max(len(low_band), len(high_band))
            low_band = low_band.expand(batch, *low_band.shape[1:])
            high_band = high_band.expand(batch, *high_band.shape[1:])
        merged = merge_bands(low_band, high_band.to(low_band), low_gain, high_gain)
        return io.NodeOutput(with_samples({**high, **low}, merged))


class BandOperation(io.ComfyNode):
    """Gains for bands, as an operation that core's nodes apply while sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `freq_loss_plugin.analysis.mixing.scale_bands`."""
        return schema(
            node_id="FreqLoss_BandOperation",
            display_name="Frequency Band Operation",
            description="Scales the low and the high band of whatever it is applied to. For the core nodes "
            "LatentApplyOperation (a latent) and LatentApplyOperationCFG (the guidance, in every sampling step: "
            "frequency-decoupled guidance).",
            search_aliases=["latent operation", "sharpen", "detail", "wavelet", "fdg", "frequency-decoupled guidance"],
            inputs=[
                _gain_input("low_gain", "Gain of the low band; 1 leaves it unchanged."),
                _gain_input("high_gain", "Gain of the high band; above 1 adds detail."),
                *band_inputs(),
            ],
            outputs=[
                io.LatentOperation.Output("operation", display_name="operation",
                                          tooltip="Connect it to LatentApplyOperation or LatentApplyOperationCFG."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, low_gain: float, high_gain: float, method: Method, wavelet: str, levels: int, cutoff: float
    ) -> io.NodeOutput:
        """Return the operation, which checks the latent that it is applied to."""
        bands = BandSpec(method, wavelet, levels, cutoff)

        def operation(latent: Tensor, **_: Any) -> Tensor:
            check_not_packed(latent, "the latent")
            latent_tensor({"samples": latent}, "the latent")
            return scale_bands(latent, low_gain, high_gain, bands)

        return io.NodeOutput(operation)


def _gain_input(name: str, tooltip: str) -> io.Input:
    return widget(io.Float, name, default=1.0, min=-10.0, max=10.0, step=0.01, tooltip=tooltip)
