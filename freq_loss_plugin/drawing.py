"""Sheets and plots, as pictures of shape (H, W, 3), float32, 0..1. Needs matplotlib, imported when it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bands import Bands
from .loss import FrequencyLoss
from .spectra import RadialSpectrum, SpectrumComparison

INSTALL_HINT = "pip install matplotlib"
# Okabe and Ito's palette, which people of every colour vision can tell apart.
COLOURS = ("#000000", "#999999", "#E69F00", "#0072B2")

# Black, orange, blue: grey would be mistaken for a part of the axes.
_CURVES = (COLOURS[0], COLOURS[2], COLOURS[3])

_FREQUENCY_MARKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)

# Of a difference, this part is shown without clipping.
_SHOWN = 0.995
_DPI = 100
_MARGIN, _TITLE = 12, 26


class Panel(NamedTuple):
    """A titled picture of a sheet, shape (3, H, W), 0..1."""

    title: str
    picture: Tensor


def contrast_factor(difference: Tensor) -> float:
    """The factor, rounded to two digits, that makes a difference fill 0..1 around a middle grey of 1/2.

    Args:
        difference: any shape; 0.5% of its values may fall outside.
    """
    magnitudes = difference.float().abs().flatten()
    step = max(1, magnitudes.numel() // 1_000_000)  # a million values say enough, and quantile takes no more than 16
    largest = float(torch.quantile(magnitudes[::step], _SHOWN)) or float(magnitudes.max())
    # What a decoder's rounding leaves of nothing stays nothing.
    return float(f"{0.5 / largest:.2g}") if largest > 1e-4 else 1.0


def show_difference(difference: Tensor, factor: float) -> Tensor:
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
    """Titled pictures in rows, and a plot of radial power spectra at their end.

    Args:
        panels: pictures of one size. They are shown with their longer side at ``side`` pixels.
        spectra: name to spectrum.
        boundary: where the low band ends, in cycles per pixel; drawn into the plot.
        heading: a line above everything.
        side: in pixels.
        columns: how many panels stand in a row.

    Raises:
        ImportError: matplotlib is missing.
    """
    height, width = panels[0].picture.shape[-2:]
    scale = side / max(height, width)
    high, wide = max(1, round(height * scale)), max(1, round(width * scale))
    cell_high, cell_wide = max(high, 240) + _TITLE + _MARGIN, max(wide, 240) + _MARGIN
    count = len(panels) + 1
    columns = min(columns, count)
    top = _TITLE if heading else 0
    rows = math.ceil(count / columns)
    total_wide, total_high = columns * cell_wide + _MARGIN, rows * cell_high + top + _MARGIN
    figure = new_figure(total_wide, total_high)
    if heading:
        figure.text(_MARGIN / total_wide, 1 - _MARGIN / total_high, heading, fontsize=10, va="top", family="monospace")

    def axes(index: int, left: int, below: int, wide: int, high: int) -> Any:
        row, column = divmod(index, columns)
        x = _MARGIN + column * cell_wide + left
        y = total_high - top - (row + 1) * cell_high + below
        return figure.add_axes([x / total_wide, y / total_high, wide / total_wide, high / total_high])

    for index, panel in enumerate(panels):
        axis = axes(index, (cell_wide - _MARGIN - wide) // 2, cell_high - _TITLE - high, wide, high)
        axis.imshow(_resized(panel.picture, high, wide).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(panel.title, fontsize=9, pad=4)
        axis.set_axis_off()
    plot = axes(len(panels), 52, 40, cell_wide - _MARGIN - 60, cell_high - _TITLE - 40)
    _draw_spectra(plot, spectra, boundary)
    return _rendered(figure)


def spectrum_plot(comparison: SpectrumComparison, boundary_name: str, size: tuple[int, int] = (900, 560)) -> Tensor:
    """Both spectra over frequency with the boundary of the bands, and the table of bands below them.

    Raises:
        ImportError: matplotlib is missing.
    """
    wide, high = size
    figure = new_figure(wide, high)
    axis = figure.add_axes([0.09, 0.32, 0.88, 0.61])
    _draw_spectra(axis, {"A": comparison.a, "B": comparison.b}, comparison.boundary)
    axis.set_title(f"radial power spectrum · {boundary_name}", fontsize=10)
    figure.text(0.09, 0.05, comparison.table(), fontsize=9, family="monospace", linespacing=1.5)
    return _rendered(figure)


def error_map_plot(maps: Bands, loss: FrequencyLoss, heading: str, side: int = 420) -> Tensor:
    """Both maps of `band_error_maps` as heat maps, with the numbers that they average to.

    Raises:
        ImportError: matplotlib is missing.
    """
    height, width = maps.low.shape
    scale = side / max(height, width)
    high, wide = max(80, round(height * scale)), max(160, round(width * scale))
    total_wide, total_high = 2 * (wide + 90) + 2 * _MARGIN, high + 2 * _TITLE + 2 * _MARGIN
    figure = new_figure(total_wide, total_high)
    from matplotlib.colors import PowerNorm

    figure.text(_MARGIN / total_wide, 1 - 8 / total_high, heading, fontsize=9, va="top", family="monospace")
    for index, (name, values, mean) in enumerate((("low", maps.low, loss.low), ("high", maps.high, loss.high))):
        left = _MARGIN + index * (wide + 90)
        axis = figure.add_axes([left / total_wide, _MARGIN / total_high, wide / total_wide, high / total_high])
        # Errors are few and large; their square root also shows the small ones.
        largest = max(float(values.max()), 1e-30)
        norm = PowerNorm(0.5, vmin=0, vmax=largest)
        image = axis.imshow(values.float().cpu().numpy(), cmap="magma", norm=norm, interpolation="nearest")
        axis.set_title(f"{name} band: L_{name} = {float(mean):.4g}", fontsize=9, pad=4)
        axis.set_axis_off()
        bar = [(left + wide + 6) / total_wide, _MARGIN / total_high, 12 / total_wide, high / total_high]
        figure.colorbar(image, cax=figure.add_axes(bar)).ax.tick_params(labelsize=7)
    return _rendered(figure)


def new_figure(wide: int, high: int, *, dpi: int = _DPI, **options: Any) -> Any:
    """A figure of wide × high pixels that needs no screen and leaves pyplot's state alone.

    Raises:
        ImportError: matplotlib is missing; says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib, which cannot be imported ({error}): {INSTALL_HINT}") from None
    return Figure(figsize=(wide / dpi, high / dpi), dpi=dpi, **options)


def _draw_spectra(axis: Any, spectra: Mapping[str, RadialSpectrum], boundary: float) -> None:
    for colour, (name, spectrum) in zip(_CURVES, spectra.items(), strict=False):
        # A power of 0 (a picture of one colour) has no place on a logarithmic scale.
        axis.loglog(spectrum.frequency, spectrum.power.clamp(min=1e-12), color=colour, label=name, linewidth=1.4)
    axis.axvline(boundary, color="#CC79A7", linestyle="--", linewidth=1)
    place = {"transform": axis.get_xaxis_transform(), "fontsize": 7, "va": "top"}
    axis.text(boundary * 0.95, 0.98, "low", ha="right", **place)
    axis.text(boundary * 1.05, 0.98, f"high, from {boundary:.3g}", ha="left", **place)
    lowest = min(float(spectrum.frequency[0]) for spectrum in spectra.values())
    marks = [mark for mark in _FREQUENCY_MARKS if mark >= lowest]
    axis.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axis.minorticks_off()
    axis.set_xlabel("cycles per pixel", fontsize=8, labelpad=1)
    axis.set_ylabel("power", fontsize=8, labelpad=1)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=8, loc="lower left")


def _resized(picture: Tensor, high: int, wide: int) -> Tensor:
    """Averaged where it shrinks, so that nothing is skipped; hard pixels where it grows: nothing is invented."""
    picture = picture.float().cpu()
    mode = "area" if high < picture.shape[-2] else "nearest"
    return F.interpolate(picture.unsqueeze(0), size=(high, wide), mode=mode)[0].clamp(0, 1)


def _rendered(figure: Any) -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    wide, high = canvas.get_width_height()
    return pixels.reshape(high, wide, 4)[..., :3].float() / 255
