"""Preview bands, compare spectra, and see where the loss comes from. All of these draw, and need matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..freq_loss_plugin.analysis.figures import (
    Panel,
    contrast_factor,
    difference_image,
    error_map_plot,
    new_figure,
    sheet,
    spectrum_plot,
)
from ..freq_loss_plugin.analysis.spectra import compare_spectra, radial_power_spectrum
from ..freq_loss_plugin.loss.bands import Method
from ..freq_loss_plugin.loss.matching import band_error_maps, frequency_matching_loss
from ..freq_loss_plugin.loss.params import BandSpec, LossSpec
from .formats import ALREADY_SCALED, AUTO, describe_colors, format_input, latent_to_rgb, select_format, to_model_scale
from .inputs import (
    CancelableProgress,
    band_inputs,
    check_finite,
    describe_bands,
    image_tensor,
    latent_tensor,
    node_output,
)
from .schema import schema, widget

# Latents (B, C, H, W) to images (B, 3, H, W), 0..1.
Render = Callable[[Tensor], Tensor]


class BandPreview(io.ComfyNode):
    """A labeled sheet of an image's bands."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `freq_loss_plugin.analysis.figures.sheet`."""
        return schema(
            node_id="FreqLoss_BandPreview",
            display_name="Preview Frequency Bands",
            description="One labeled sheet per image or latent: original, low band, high band, the detail of each "
            "wavelet level, and the radial power spectrum with the boundary between the bands.",
            search_aliases=["wavelet", "fft", "spectrum", "frequency", "analysis"],
            inputs=[
                io.MultiType.Input("source", types=[io.Image, io.Latent],
                                   tooltip="Images or latents; one sheet per batch item."),
                io.Vae.Input("vae", optional=True, tooltip="For latents: decode the bands with this VAE. Without it "
                             "they are shown in the approximate colors of the latent format. A band that is the "
                             "difference of two latents is shown as the difference of the two decoded images."),
                *band_inputs(),
                format_input(AUTO, default=AUTO,
                             tooltip="For latents without a VAE: the model that they belong to, for the colors. auto "
                             "decides by the number of channels (4: SD1.x, 16: FLUX)."),
                widget(io.Int, "frame", default=0, min=0, max=9999, advanced=True,
                       tooltip="For video latents: which frame to show; the last one if there are fewer."),
                widget(io.Int, "panel_size", default=512, min=64, max=2048, step=8, advanced=True,
                       tooltip="Longer side of each panel in pixels. Smaller images are enlarged by nearest "
                       "neighbor, larger ones are averaged down, which hides their finest detail."),
            ],
            outputs=[io.Image.Output("sheet", display_name="sheet", tooltip="One sheet per batch item.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        source: Any,
        method: Method,
        wavelet: str,
        levels: int,
        cutoff: float,
        latent_format: str,
        frame: int,
        panel_size: int,
        vae: Any = None,
    ) -> io.NodeOutput:
        """Draw one sheet after the other."""
        bands = BandSpec(method, wavelet, levels, cutoff)
        tensor, render, description = _prepare_source(source, vae, latent_format, frame)
        bands.check_size(*tensor.shape[-2:])
        progress = CancelableProgress(len(tensor))
        sheets = []
        for number, item in enumerate(tensor.split(1), 1):
            position = f"{number} of {len(tensor)}, " if len(tensor) > 1 else ""
            heading = f"{position}{description} · {describe_bands(bands)}"
            sheets.append(_draw_sheet(item, render, bands, heading, panel_size))
            progress.step()
        images = torch.stack(sheets)
        return node_output(cls, images, images=images)


def _prepare_source(source: Any, vae: Any, format_choice: str, frame: int) -> tuple[Tensor, Render, str]:
    """The tensor to split, shape (B, C, H, W); how to make images of it; and a description of both."""
    if not isinstance(source, dict):
        tensor = image_tensor(source, "source")
        return tensor, lambda images: images, "image {3} × {2}".format(*tensor.shape)
    tensor = latent_tensor(source, "source")
    selected = select_format(format_choice, tensor) if vae is None else None
    is_video, frame_label = tensor.ndim == 5, ""
    if is_video:
        count = tensor.shape[2]
        frame = min(frame, count - 1)
        tensor, frame_label = tensor[:, :, frame], f", frame {frame + 1} of {count}"
    description = "latent {3} × {2}, {1} channels".format(*tensor.shape) + frame_label
    if vae is None:
        colors = describe_colors(format_choice, selected)
        return tensor, lambda latents: latent_to_rgb(latents, selected), f"{description}, {colors}"
    return tensor, lambda latents: _decode(vae, latents, is_video), f"{description}, decoded"


def _decode(vae: Any, latents: Tensor, is_video: bool) -> Tensor:
    """Latents (B, C, H, W) decoded to images (B, 3, H, W); of a video the first frame."""
    decoded = vae.decode(latents.unsqueeze(2) if is_video else latents)
    return image_tensor(decoded[:, 0] if decoded.ndim == 5 else decoded, "the decoded latent").float().cpu()


def _draw_sheet(source: Tensor, render: Render, bands: BandSpec, heading: str, side: int) -> Tensor:
    """The sheet of one image or latent (1, C, H, W)."""
    source = source.float()
    lows = bands.low_bands(source)
    stages = [render(stage)[0].cpu() for stage in (source, *lows)]
    panels = [Panel("original", stages[0]), Panel("low band", stages[-1])]
    panels.append(_difference_panel("high band", stages[0] - stages[-1]))
    if len(lows) > 1:
        panels += [
            _difference_panel(f"detail of level {level}", finer - coarser)
            for level, (finer, coarser) in enumerate(itertools.pairwise(stages), 1)
        ]
    tensors = {"original": source, "low": lows[-1], "high": source - lows[-1]}
    spectra = {name: radial_power_spectrum(tensor.cpu()) for name, tensor in tensors.items()}
    return sheet(panels, spectra, bands.boundary(*source.shape[-2:]), heading=heading, side=side)


def _difference_panel(name: str, difference: Tensor) -> Panel:
    factor = contrast_factor(difference)
    return Panel(f"{name} × {factor:g}", difference_image(difference, factor))


class SpectrumCompare(io.ComfyNode):
    """Two sets of images or latents, frequency by frequency."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `freq_loss_plugin.analysis.spectra.compare_spectra`."""
        return schema(
            node_id="FreqLoss_SpectrumCompare",
            display_name="Compare Spectra",
            description="Radial power spectra of two sets, the fraction of the variance in each band, and their "
            "log-spectral distance in dB (0: equal). Compares generated images with the training images, for instance.",
            search_aliases=["wavelet", "fft", "frequency", "spectrum", "distance", "metric"],
            inputs=[
                io.MultiType.Input("a", types=[io.Image, io.Latent], tooltip="First set: a batch of any size."),
                io.MultiType.Input("b", types=[io.Image, io.Latent],
                                   tooltip="Second set, of the same type. Number and size may differ."),
                *band_inputs(),
            ],
            outputs=[
                io.Image.Output("plot", display_name="plot", tooltip="Both spectra and the table."),
                io.String.Output("table", display_name="table",
                                 tooltip="Fraction of the variance, ratio and distance of each band."),
                io.Float.Output("distance", display_name="distance",
                                tooltip="Log-spectral distance over all frequencies, in dB."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, a: Any, b: Any, method: Method, wavelet: str, levels: int, cutoff: float) -> io.NodeOutput:
        """Measure both sets, image by image."""
        new_figure(1, 1)  # fails now where matplotlib is missing, and not after the work
        bands = BandSpec(method, wavelet, levels, cutoff)
        if isinstance(a, dict) != isinstance(b, dict):
            type_a, type_b = ("LATENT" if isinstance(value, dict) else "IMAGE" for value in (a, b))
            raise ValueError(
                f"a is of type {type_a} and b of type {type_b}: the frequencies of an image and of a latent are not "
                "comparable; encode or decode one of them"
            )
        to_tensor = latent_tensor if isinstance(a, dict) else image_tensor
        sets = to_tensor(a, "a"), to_tensor(b, "b")
        for tensor, name in zip(sets, "ab", strict=True):
            bands.check_size(*tensor.shape[-2:])
            check_finite(tensor, name)
        progress = CancelableProgress(sum(map(_image_count, sets)))
        comparison = compare_spectra(*sets, bands, on_image=progress.step)
        plot = spectrum_plot(comparison, describe_bands(bands)).unsqueeze(0)
        return node_output(cls, plot, comparison.table(), comparison.distance, images=plot)


def _image_count(tensor: Tensor) -> int:
    """B, or the number of all frames B·T."""
    return len(tensor) * (tensor.shape[2] if tensor.ndim == 5 else 1)


class BandLoss(io.ComfyNode):
    """The training loss of two clean latents, and where it comes from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `freq_loss_plugin.loss.matching.frequency_matching_loss`."""
        weight = {"min": 0.0, "max": 1000.0, "step": 0.01}
        return schema(
            node_id="FreqLoss_BandLoss",
            display_name="Frequency Band Loss",
            description="The frequency loss between two batches of clean latents, with the same numbers as in "
            "training: the bands of the difference of the two batch sums, squared and averaged.",
            search_aliases=["wavelet", "fft", "distribution matching", "metric"],
            inputs=[
                io.Latent.Input("prediction", tooltip="Predicted clean latents, for instance encoded samples."),
                io.Latent.Input("target", tooltip="Clean latents of the same shape, for instance encoded training "
                                "images."),
                *band_inputs(),
                widget(io.Float, "low_weight", default=0.7, tooltip="Weight of the low band.", **weight),
                widget(io.Float, "high_weight", default=0.3, tooltip="Weight of the high band.", **weight),
                widget(io.Float, "dist_match", default=0.003, min=0.0, max=1000.0, step=0.001, round=False,
                       tooltip="Weight of the whole term, as in the TOML of a training run."),
                widget(io.Combo, "reduction", options=["sum", "mean"], default="sum",
                       tooltip="sum over the batch (as in the formula), or mean, which does not grow with the batch "
                       "size."),
                format_input(ALREADY_SCALED, default="SD1.x",
                             tooltip="The model that the latents belong to. Training scales latents (SD1.x by "
                             "0.18215), and ComfyUI does not; the numbers depend on it."),
            ],
            outputs=[
                io.Float.Output("low", display_name="low", tooltip="L_low, unweighted."),
                io.Float.Output("high", display_name="high", tooltip="L_high, unweighted."),
                io.Float.Output("total", display_name="total",
                                tooltip="dist_match · (low_weight · L_low + high_weight · L_high)."),
                io.Image.Output("error_map", display_name="error map",
                                tooltip="Where in the image low and high come from; the mean of each map is its "
                                "number."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        prediction: dict,
        target: dict,
        method: Method,
        wavelet: str,
        levels: int,
        cutoff: float,
        latent_format: str,
        **weights: Any,
    ) -> io.NodeOutput:
        """Scale the latents as training does, and compute the loss of clean latents."""
        spec = LossSpec(bands=BandSpec(method, wavelet, levels, cutoff), **weights)
        predicted = _in_model_scale(prediction, "prediction", latent_format)
        clean = _in_model_scale(target, "target", latent_format).to(predicted.device)
        loss = frequency_matching_loss(predicted, clean, prediction_type="sample", timesteps=None, config=spec)
        difference = predicted.float() - clean.float()
        difference = difference.sum(dim=0) if spec.reduction == "sum" else difference.mean(dim=0)
        maps = band_error_maps(difference, spec.bands)
        heading = f"total = {float(loss.total):.4g} · {describe_bands(spec.bands)} · batch of {len(predicted)}"
        plot = error_map_plot(maps, loss, f"{heading} · scale: {latent_format}").unsqueeze(0)
        return node_output(cls, float(loss.low), float(loss.high), float(loss.total), plot, images=plot)


def _in_model_scale(latent: dict, name: str, format_choice: str) -> Tensor:
    samples = latent_tensor(latent, name)
    check_finite(samples, name)
    return to_model_scale(samples, select_format(format_choice, samples))
