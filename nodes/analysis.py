"""Look at bands, compare spectra, and see where the loss comes from. Everything here draws, and needs matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..freq_loss_plugin.bands import low_bands
from ..freq_loss_plugin.config import FreqLossConfig
from ..freq_loss_plugin.drawing import (
    Panel,
    contrast_factor,
    error_map_plot,
    new_figure,
    sheet,
    show_difference,
    spectrum_plot,
)
from ..freq_loss_plugin.loss import band_error_maps, frequency_matching_loss
from ..freq_loss_plugin.spectra import band_boundary, compare_spectra, radial_power_spectrum
from .formats import AUTO, SCALED, colors_of, format_input, latent_format, rgb, scaled
from .inputs import (
    Work,
    band_options,
    describe_bands,
    in_node_words,
    pictures_of,
    samples_of,
    shown,
)
from .schema import schema, widget

# Latents (B, C, H, W) to pictures (B, 3, H, W), 0..1.
Render = Callable[[Tensor], Tensor]


class BandPreview(io.ComfyNode):
    """A labelled sheet of a picture's bands."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `freq_loss_plugin.drawing.sheet`."""
        return schema(
            node_id="FreqLoss_BandPreview",
            display_name="Preview Frequency Bands",
            description="One labelled sheet for each picture or latent: original, low band, high band, the detail of "
            "each wavelet level, and the radial power spectrum with the boundary between the bands.",
            search_aliases=["wavelet", "fft", "spectrum", "frequency", "analysis"],
            inputs=[
                io.MultiType.Input("source", types=[io.Image, io.Latent],
                                   tooltip="Pictures or latents; one sheet for each of the batch."),
                io.Vae.Input("vae", optional=True, tooltip="Latents: decode the bands with this VAE. Without one they "
                             "are shown by the latent format's approximate colours. A band that is the difference of "
                             "two latents is shown as the difference of the two decoded pictures."),
                *band_options(),
                format_input(AUTO, default=AUTO,
                             tooltip="Latents without a VAE: the model that they are from, for the colours. auto "
                             "goes by the number of channels (4: SD1.x, 16: FLUX)."),
                widget(io.Int, "frame", default=0, min=0, max=9999, advanced=True,
                       tooltip="Video latents: which frame to show; the last one where there are fewer."),
                widget(io.Int, "panel_size", default=512, min=64, max=2048, step=8, advanced=True,
                       tooltip="Longer side of each panel in pixels. Smaller pictures grow with hard pixels, larger "
                       "ones are averaged down, which hides their finest detail."),
            ],
            outputs=[io.Image.Output("sheet", display_name="sheet", tooltip="One sheet for each of the batch.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @in_node_words
    def execute(
        cls,
        source: Any,
        method: str,
        wavelet: str,
        levels: int,
        cutoff: float,
        latent_format: str,
        frame: int,
        panel_size: int,
        vae: Any = None,
    ) -> io.NodeOutput:
        """Draw one sheet after the other."""
        config = FreqLossConfig(method=method, wavelet=wavelet, levels=levels, cutoff=cutoff)
        tensor, render, told = _source(source, vae, latent_format, frame)
        config.check_size(*tensor.shape[-2:])
        work = Work(len(tensor))
        sheets = []
        for number, one in enumerate(tensor.split(1), 1):
            which = f"{number} of {len(tensor)}, " if len(tensor) > 1 else ""
            sheets.append(_sheet(one, render, config, f"{which}{told} · {describe_bands(config)}", panel_size))
            work.step()
        result = torch.stack(sheets)
        return shown(cls, result, pictures=result)


def _source(source: Any, vae: Any, format_choice: str, frame: int) -> tuple[Tensor, Render, str]:
    """The tensor to split, how to make pictures of it, and both in words."""
    if not isinstance(source, dict):
        tensor = pictures_of(source, "source")
        return tensor, lambda pictures: pictures, "picture {3} × {2}".format(*tensor.shape)
    tensor, of_frames = samples_of(source, "source"), ""
    chosen = latent_format(format_choice, tensor) if vae is None else None
    if tensor.ndim == 5:
        frames = tensor.shape[2]
        shown_frame = min(frame, frames - 1)
        tensor, of_frames = tensor[:, :, shown_frame], f", frame {shown_frame + 1} of {frames}"
        decoded = (lambda latents: vae.decode(latents.unsqueeze(2))) if vae is not None else None
    else:
        decoded = vae.decode if vae is not None else None
    size = "latent {3} × {2}, {1} channels".format(*tensor.shape) + of_frames
    if decoded is not None:
        return tensor, lambda latents: _decoded(decoded(latents)), f"{size}, decoded"
    return tensor, lambda latents: rgb(latents, chosen), f"{size}, {colors_of(format_choice, chosen)}"


def _decoded(image: Tensor) -> Tensor:
    """What a VAE made of latents, as pictures (B, 3, H, W); of a video the first frame."""
    return pictures_of(image[:, 0] if image.ndim == 5 else image, "the decoded latent").float().cpu()


def _sheet(one: Tensor, render: Render, config: FreqLossConfig, heading: str, side: int) -> Tensor:
    """The sheet of one picture or latent (1, C, H, W)."""
    one = one.float()
    lows = low_bands(one, config.method, config.wavelet, config.levels, cutoff=config.cutoff)
    stages = [render(stage)[0].cpu() for stage in (one, *lows)]
    panels = [Panel("original", stages[0]), Panel("low band", stages[-1])]
    panels.append(_difference_panel("high band", stages[0] - stages[-1]))
    if len(lows) > 1:
        panels += [
            _difference_panel(f"detail of level {level}", finer - coarser)
            for level, (finer, coarser) in enumerate(itertools.pairwise(stages), 1)
        ]
    split = {"original": one, "low": lows[-1], "high": one - lows[-1]}
    spectra = {name: radial_power_spectrum(tensor.cpu()) for name, tensor in split.items()}
    boundary = band_boundary(config, *one.shape[-2:])
    return sheet(panels, spectra, boundary, heading=heading, side=side)


def _difference_panel(name: str, difference: Tensor) -> Panel:
    factor = contrast_factor(difference)
    return Panel(f"{name} × {factor:g}", show_difference(difference, factor))


class SpectrumCompare(io.ComfyNode):
    """Two sets of pictures or latents, frequency by frequency."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `freq_loss_plugin.spectra.compare_spectra`."""
        return schema(
            node_id="FreqLoss_SpectrumCompare",
            display_name="Compare Spectra",
            description="Radial power spectra of two sets, the share of each band, and their log-spectral distance in "
            "dB (0: equal). For instance generated pictures against the training pictures.",
            search_aliases=["wavelet", "fft", "frequency", "spectrum", "distance", "metric"],
            inputs=[
                io.MultiType.Input("a", types=[io.Image, io.Latent], tooltip="First set: a batch of any size."),
                io.MultiType.Input("b", types=[io.Image, io.Latent],
                                   tooltip="Second set, of the same kind. Number and size may differ."),
                *band_options(),
            ],
            outputs=[
                io.Image.Output("plot", display_name="plot", tooltip="Both spectra and the table."),
                io.String.Output("table", display_name="table", tooltip="Share, ratio and distance of each band."),
                io.Float.Output("distance", display_name="distance",
                                tooltip="Log-spectral distance over all frequencies, in dB."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @in_node_words
    def execute(cls, a: Any, b: Any, method: str, wavelet: str, levels: int, cutoff: float) -> io.NodeOutput:
        """Measure both sets, picture by picture."""
        new_figure(1, 1)  # told now, where matplotlib is missing, and not after the work
        config = FreqLossConfig(method=method, wavelet=wavelet, levels=levels, cutoff=cutoff)
        if isinstance(a, dict) != isinstance(b, dict):
            first, second = ("LATENT" if isinstance(each, dict) else "IMAGE" for each in (a, b))
            raise ValueError(
                f"a is of type {first} and b of type {second}: a frequency means another thing in each; encode or "
                "decode one"
            )
        sets = [
            samples_of(each, name) if isinstance(each, dict) else pictures_of(each, name)
            for name, each in (("a", a), ("b", b))
        ]
        for each in sets:
            config.check_size(*each.shape[-2:])
        work = Work(sum(len(each) * (each.shape[2] if each.ndim == 5 else 1) for each in sets))
        comparison = compare_spectra(*sets, config, on_picture=work.step)
        plot = spectrum_plot(comparison, describe_bands(config)).unsqueeze(0)
        return shown(cls, plot, comparison.table(), comparison.distance, pictures=plot)


class BandLoss(io.ComfyNode):
    """The training loss of two clean latents, and where it comes from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `freq_loss_plugin.loss.frequency_matching_loss`."""
        weight = {"min": 0.0, "max": 1000.0, "step": 0.01}
        return schema(
            node_id="FreqLoss_BandLoss",
            display_name="Frequency Band Loss",
            description="The frequency loss between two batches of clean latents, with the numbers that training would "
            "compute: the bands of the difference of the two batch sums, squared and averaged.",
            search_aliases=["wavelet", "fft", "distribution matching", "metric"],
            inputs=[
                io.Latent.Input("prediction", tooltip="Predicted clean latents, for instance encoded samples."),
                io.Latent.Input("target", tooltip="Clean latents of the same shape, for instance encoded training "
                                "pictures."),
                *band_options(),
                widget(io.Float, "low_weight", default=0.7, tooltip="Weight of the low band.", **weight),
                widget(io.Float, "high_weight", default=0.3, tooltip="Weight of the high band.", **weight),
                widget(io.Float, "dist_match", default=0.003, min=0.0, max=1000.0, step=0.001, round=False,
                       tooltip="Weight of the whole term, as in the training's TOML."),
                widget(io.Combo, "reduction", options=["sum", "mean"], default="sum",
                       tooltip="sum over the batch (the formula), or mean, which does not grow with the batch."),
                format_input(SCALED, default="SD1.x",
                             tooltip="The model that the latents are from. Training scales latents (SD1.x by 0.18215), "
                             "ComfyUI does not; the numbers depend on it."),
            ],
            outputs=[
                io.Float.Output("low", display_name="low", tooltip="L_low, without weights."),
                io.Float.Output("high", display_name="high", tooltip="L_high, without weights."),
                io.Float.Output("total", display_name="total",
                                tooltip="dist_match · (low_weight · L_low + high_weight · L_high)."),
                io.Image.Output("error_map", display_name="error map",
                                tooltip="Where in the picture both come from; each map averages to its number."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    @in_node_words
    def execute(cls, prediction: dict, target: dict, latent_format: str, **options: Any) -> io.NodeOutput:
        """Scale as training does, and compute the loss of clean latents."""
        config = FreqLossConfig(**options)
        predicted, clean = samples_of(prediction, "prediction"), samples_of(target, "target")
        predicted, clean = (_as_trained(each, latent_format) for each in (predicted, clean.to(predicted.device)))
        loss = frequency_matching_loss(predicted, clean, prediction_type="sample", timesteps=None, config=config)
        difference = predicted.float() - clean.float()
        difference = difference.sum(dim=0) if config.reduction == "sum" else difference.mean(dim=0)
        maps = band_error_maps(difference, config)
        heading = f"total = {float(loss.total):.4g} · {describe_bands(config)} · batch of {len(predicted)}"
        plot = error_map_plot(maps, loss, f"{heading} · scale: {latent_format}").unsqueeze(0)
        return shown(cls, float(loss.low), float(loss.high), float(loss.total), plot, pictures=plot)


def _as_trained(samples: Tensor, format_choice: str) -> Tensor:
    return scaled(samples, latent_format(format_choice, samples))
