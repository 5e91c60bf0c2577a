"""Sheets and plots, as images of shape (H, W, 3), float32, 0..1. Needs matplotlib, imported when it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..loss.bands import Bands
from ..loss.params import FrequencyLoss
from .spectra import RadialSpectrum, SpectrumComparison

INSTALL_HINT = "pip install matplotlib"
# Of Okabe and Ito's palette, which people with any color vision can tell apart.
COLORS = ("#000000", "#999999", "#E69F00", "#0072B2")

# Black, orange, blue: gray could be mistaken for a part of the axes.
_CURVES = (COLORS[0], COLORS[2], COLORS[3])

_FREQUENCY_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)

# The fraction of a difference's values that is shown without clipping.
_UNCLIPPED_FRACTION = 0.995
_DPI = 100
_MARGIN, _TITLE = 12, 26


class Panel(NamedTuple):
    """A titled image of a sheet, shape (3, H, W), 0..1."""

    title: str
    image: Tensor


def contrast_factor(difference: Tensor) -> float:
    """The factor, rounded to two digits, that stretches a difference to 0..1 around a middle gray of 1/2.

    Args:
        difference: any shape; 0.5% of its values may be clipped.

    Returns:
        1 for differences of about 0.
    """
    magnitudes = difference.float().abs().flatten()
    step = max(1, magnitudes.numel() // 1_000_000)  # a million values are enough; torch.quantile fails beyond 16
    largest = float(torch.quantile(magnitudes[::step], _UNCLIPPED_FRACTION)) or float(magnitudes.max())
    # A decoder's rounding errors are not amplified.
    return float(f"{0.5 / largest:.2g}") if largest > 1e-4 else 1.0


def difference_image(difference: Tensor, factor: float) -> Tensor:
    """``1/2 + factor·difference``, clipped to 0..1."""
    return (0.5 + factor * difference).clamp(0, 1)


def sheet(
    panels: Sequence[Panel],
    spectra: Mapping[str, RadialSpectrum],
    boundary: float,
    *,
    heading: str = "",
    side: int = 512,
    columns: int = 3,
) -> Tensor:
    """Titled images in rows, followed by a plot of radial power spectra.

    Args:
        panels: images of one size.
        spectra: name to spectrum.
        boundary: where the low band ends, in cycles per pixel; drawn into the plot.
        heading: a line above everything.
        side: the longer side of each image on the sheet, in pixels.
        columns: the number of panels in a row.

    Raises:
        ImportError: matplotlib is missing.
    """
    scale = side / max(panels[0].image.shape[-2:])
    height, width = (max(1, round(length * scale)) for length in panels[0].image.shape[-2:])
    cell_height, cell_width = max(height, 240) + _TITLE + _MARGIN, max(width, 240) + _MARGIN
    count = len(panels) + 1
    columns = min(columns, count)
    top = _TITLE if heading else 0
    rows = math.ceil(count / columns)
    total_width, total_height = columns * cell_width + _MARGIN, rows * cell_height + top + _MARGIN
    figure = new_figure(total_width, total_height)
    if heading:
        figure.text(
            _MARGIN / total_width, 1 - _MARGIN / total_height, heading, fontsize=10, va="top", family="monospace"
        )

    def axes(index: int, left: int, below: int, width: int, height: int) -> Any:
        row, column = divmod(index, columns)
        x = _MARGIN + column * cell_width + left
        y = total_height - top - (row + 1) * cell_height + below
        return figure.add_axes([x / total_width, y / total_height, width / total_width, height / total_height])

    for index, panel in enumerate(panels):
        axis = axes(index, (cell_width - _MARGIN - width) // 2, cell_height - _TITLE - height, width, height)
        axis.imshow(_resize(panel.image, height, width).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(panel.title, fontsize=9, pad=4)
        axis.set_axis_off()
    plot = axes(len(panels), 52, 40, cell_width - _MARGIN - 60, cell_height - _TITLE - 40)
    _draw_spectra(plot, spectra, boundary)
    return _render(figure)


def spectrum_plot(comparison: SpectrumComparison, boundary_name: str, size: tuple[int, int] = (900, 560)) -> Tensor:
    """Both spectra over frequency with the boundary of the bands, and the table of bands below them.

    Raises:
        ImportError: matplotlib is missing.
    """
    width, height = size
    figure = new_figure(width, height)
    axis = figure.add_axes([0.09, 0.32, 0.88, 0.61])
    _draw_spectra(axis, {"A": comparison.a, "B": comparison.b}, comparison.boundary)
    axis.set_title(f"radial power spectrum · {boundary_name}", fontsize=10)
    figure.text(0.09, 0.05, comparison.table(), fontsize=9, family="monospace", linespacing=1.5)
    return _render(figure)


def law_plot(
    spectrum: RadialSpectrum | None, expected: Tensor | None, title: str, size: tuple[int, int] = (700, 440)
) -> Tensor:
    """A radial power spectrum and the power expected at its frequencies; without one, the title alone.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = new_figure(*size)
    figure.text(0.5, 0.96, title, fontsize=9, ha="center", va="top", wrap=True)
    if spectrum is None or expected is None:
        return _render(figure)
    axis = figure.add_axes([0.1, 0.12, 0.87, 0.76])
    axis.loglog(spectrum.frequency, expected, color=COLORS[3], linestyle="--", label="expected power law")
    axis.loglog(spectrum.frequency, spectrum.power.clamp(min=1e-12), color=COLORS[0], linewidth=1.4, label="measured")
    _label_frequencies(axis, float(spectrum.frequency[0]))
    return _render(figure)


def weights_plot(weights: Mapping[str, Tensor], end: int, size: tuple[int, int] = (700, 420)) -> Tensor:
    """Weights over timesteps 0..end as steps, one per bin, on a logarithmic scale.

    Args:
        weights: name to the weights of bins of equal width.
        end: where the last bin ends.
        size: width and height in pixels.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = new_figure(*size)
    axis = figure.add_axes([0.1, 0.12, 0.86, 0.84])
    for color, (name, values) in zip(_CURVES[1:], weights.items(), strict=False):
        axis.stairs(values.numpy(), torch.linspace(0, end, len(values) + 1).numpy(), color=color, label=name)
    axis.axhline(1, color=COLORS[1], linewidth=0.8)
    axis.set_yscale("log")
    axis.set_xlim(0, end)
    axis.set_xlabel("timestep", fontsize=8)
    axis.set_ylabel("weight of the base loss", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=8)
    return _render(figure)


def timesteps_plot(least: Mapping[str, Sequence[int]], count: int, size: tuple[int, int] = (700, 420)) -> Tensor:
    """Which fraction of ``count`` images trains at each timestep 0..1000.

    Args:
        least: name to the least timesteps of the images for which it is known.
        count: all images.
        size: width and height in pixels.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = new_figure(*size)
    axis = figure.add_axes([0.1, 0.12, 0.86, 0.84])
    timesteps = torch.arange(1001)
    for color, (name, values) in zip(_CURVES[1:], least.items(), strict=False):
        fractions = (torch.tensor(values)[:, None] <= timesteps).sum(dim=0) / max(1, count)
        axis.step(timesteps.numpy(), fractions.numpy(), where="post", color=color, label=name, linewidth=1.6)
    axis.set_xlim(0, 1000)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("timestep", fontsize=8)
    axis.set_ylabel("fraction of the images that train there", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=8, loc="lower right")
    return _render(figure)


def error_map_plot(maps: Bands, loss: FrequencyLoss, heading: str, side: int = 420) -> Tensor:
    """Both maps of `band_error_maps` as heat maps, with their means, L_low and L_high.

    Raises:
        ImportError: matplotlib is missing.
    """
    scale = side / max(maps.low.shape)
    height, width = max(80, round(maps.low.shape[0] * scale)), max(160, round(maps.low.shape[1] * scale))
    total_width, total_height = 2 * (width + 90) + 2 * _MARGIN, height + 2 * _TITLE + 2 * _MARGIN
    figure = new_figure(total_width, total_height)
    from matplotlib.colors import PowerNorm

    figure.text(_MARGIN / total_width, 1 - 8 / total_height, heading, fontsize=9, va="top", family="monospace")
    for index, (name, values, mean) in enumerate((("low", maps.low, loss.low), ("high", maps.high, loss.high))):
        left = _MARGIN + index * (width + 90)
        axis = figure.add_axes([left / total_width, _MARGIN / total_height, width / total_width, height / total_height])
        # Errors are sparse and large; on a square-root scale the small ones are visible, too.
        largest = max(float(values.max()), 1e-30)
        norm = PowerNorm(0.5, vmin=0, vmax=largest)
        image = axis.imshow(values.float().cpu().numpy(), cmap="magma", norm=norm, interpolation="nearest")
        axis.set_title(f"{name} band: L_{name} = {float(mean):.4g}", fontsize=9, pad=4)
        axis.set_axis_off()
        bar = [(left + width + 6) / total_width, _MARGIN / total_height, 12 / total_width, height / total_height]
        figure.colorbar(image, cax=figure.add_axes(bar)).ax.tick_params(labelsize=7)
    return _render(figure)


def new_figure(width: int, height: int, *, dpi: int = _DPI, **options: Any) -> Any:
    """A figure of width × height pixels that needs no display and doesn't touch pyplot's state.

    Raises:
        ImportError: matplotlib is missing; says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib, which cannot be imported ({error}): {INSTALL_HINT}") from None
    return Figure(figsize=(width / dpi, height / dpi), dpi=dpi, **options)


def _draw_spectra(axis: Any, spectra: Mapping[str, RadialSpectrum], boundary: float) -> None:
    for color, (name, spectrum) in zip(_CURVES, spectra.items(), strict=False):
        # A logarithmic scale cannot show a power of 0 (an image of a single color).
        axis.loglog(spectrum.frequency, spectrum.power.clamp(min=1e-12), color=color, label=name, linewidth=1.4)
    axis.axvline(boundary, color="#CC79A7", linestyle="--", linewidth=1)
    style = {"transform": axis.get_xaxis_transform(), "fontsize": 7, "va": "top"}
    axis.text(boundary * 0.95, 0.98, "low", ha="right", **style)
    axis.text(boundary * 1.05, 0.98, f"high, from {boundary:.3g}", ha="left", **style)
    _label_frequencies(axis, min(float(spectrum.frequency[0]) for spectrum in spectra.values()))


def _label_frequencies(axis: Any, lowest: float) -> None:
    ticks = [tick for tick in _FREQUENCY_TICKS if tick >= lowest]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("cycles per pixel", fontsize=8, labelpad=1)
    axis.set_ylabel("power", fontsize=8, labelpad=1)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=8, loc="lower left")


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """Area averaging where an image shrinks, nearest neighbor where it grows."""
    image = image.float().cpu()
    mode = "area" if height < image.shape[-2] else "nearest"
    return F.interpolate(image.unsqueeze(0), size=(height, width), mode=mode)[0].clamp(0, 1)


def _render(figure: Any) -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels.reshape(height, width, 4)[..., :3].float() / 255
