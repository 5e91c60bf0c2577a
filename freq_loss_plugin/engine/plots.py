"""The two images that a comparison writes."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..analysis.figures import COLORS, new_figure
from ..analysis.fonts import fonts, is_drawable
from ..analysis.spectra import radial_power_spectrum
from ..atomic_files import write_whole
from .evaluation import ERROR_TIMESTEPS
from .outcome import Outcome


def comparison(file: Path, rows: Mapping[str, Tensor], prompts: list[str]) -> Path:
    """Write a grid of images, one row per entry of ``rows`` and one column per prompt.

    Args:
        file: the PNG.
        rows: images of shape (n, 3, H, W), 0..1, by name.
        prompts: titles of the columns.
    """
    figure, axes = _figure(len(rows), len(prompts), 1.55, 1.7)
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(textwrap.fill(name, 16), fontsize=9)
        for axis, image in zip(row, images, strict=False):
            axis.imshow(image.permute(1, 2, 0).numpy())
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    for number, (axis, prompt) in enumerate(zip(axes[1], prompts, strict=True), start=1):
        title = prompt if is_drawable(prompt) else f"prompt {number} (no font for its characters)"
        # A dollar in a caption is no mathematics.
        axis.set_title(textwrap.fill(title, 26), fontsize=6, family=fonts(), parse_math=False)
    return _write(figure, file)


def curves(file: Path, outcomes: Mapping[str, Outcome], rows: Mapping[str, Tensor]) -> Path:
    """Write the validation error by timestep and band, the losses of the term if there is one, and radial spectra.

    Args:
        file: the PNG.
        outcomes: runs by name.
        rows: images of shape (n, 3, H, W), 0..1, by name.
    """
    has_term = any(numbers.low or numbers.high for each in outcomes.values() for numbers in each.history)
    has_errors = any(each.evaluations for each in outcomes.values())
    bands = ("low", "high")
    panels: list[Callable[[Any], None]] = [lambda axis: _draw_spectra(axis, rows, colors)]
    # The same colors in every plot: true images, before, plain MSE, with the loss.
    colors = dict(zip(rows, COLORS, strict=False))
    if has_term:
        panels = [functools.partial(_draw_band_loss, outcomes, colors, band) for band in bands] + panels
    if has_errors:
        panels = [functools.partial(_draw_errors, outcomes, colors, band) for band in bands] + panels
    figure, axes = _figure(1, len(panels), 4.2, 3.4)
    for axis, draw in zip(axes[0], panels, strict=True):
        draw(axis)
        axis.legend(fontsize=8)
    return _write(figure, file)


def _draw_errors(outcomes: Mapping[str, Outcome], colors: Mapping[str, str], band: str, axis: Any) -> None:
    for name, outcome in outcomes.items():
        before, after = (errors[("low", "high").index(band)] for errors in outcome.errors)
        axis.semilogy(ERROR_TIMESTEPS, (after / before).tolist(), label=name, color=colors[name], marker=".")
    axis.axhline(1, color=colors["before"], label="before")
    axis.set_title(f"validation error, {band} band, relative to before", fontsize=10)
    axis.set_xlabel("timestep (noise level)")


def _draw_band_loss(outcomes: Mapping[str, Outcome], colors: Mapping[str, str], band: str, axis: Any) -> None:
    for name, outcome in outcomes.items():
        if outcome.evaluations:
            steps = [evaluation.step for evaluation in outcome.evaluations]
            axis.plot(steps, [getattr(each, band) for each in outcome.evaluations], label=name, color=colors[name])
        elif any(getattr(numbers, band) for numbers in outcome.history):
            axis.plot(_smooth([getattr(each, band) for each in outcome.history]), color=colors[name], label=name)
    where = "validation images" if any(outcome.evaluations for outcome in outcomes.values()) else "training batches"
    axis.set_title(f"L_{band} on {where}", fontsize=10)
    axis.set_xlabel("step")
    axis.set_ylim(bottom=0)


def _draw_spectra(axis: Any, rows: Mapping[str, Tensor], colors: Mapping[str, str]) -> None:
    for name, images in rows.items():
        spectrum = radial_power_spectrum(images)
        axis.loglog(spectrum.frequency, spectrum.power, label=name, color=colors[name])
    axis.set_title("radial power spectrum", fontsize=10)
    axis.set_xlabel("cycles per pixel")


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure of rows × columns plots of width × height inches."""
    pixels = 120 * (width * columns + 0.6), 120 * (height * rows + 0.2)
    figure = new_figure(*map(round, pixels), dpi=120, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _write(figure: Any, file: Path) -> Path:
    write_whole(file, lambda part: figure.savefig(part, format="png"))
    return file


def _smooth(values: list[float], window: int = 20) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
