"""Sheets and plots, tested by their pixels."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from freq_loss_plugin import BandSpec
from freq_loss_plugin.analysis.figures import (
    Panel,
    contrast_factor,
    difference_image,
    error_map_plot,
    sheet,
    spectrum_plot,
)
from freq_loss_plugin.analysis.spectra import compare_spectra, radial_power_spectrum
from freq_loss_plugin.loss.bands import Bands
from freq_loss_plugin.loss.matching import band_error_maps
from freq_loss_plugin.loss.params import FrequencyLoss


def panels(*colors, size=(32, 48)):
    return [Panel(str(color), torch.tensor(color).view(3, 1, 1).expand(3, *size)) for color in colors]


def spectra(size=(32, 48)):
    return {"original": radial_power_spectrum(torch.randn(1, 3, *size))}


def count(image, color):
    return int((image - torch.tensor(color)).abs().lt(0.01).all(dim=-1).sum())


@pytest.mark.parametrize("size", [(32, 48), (300, 20), (1000, 1200), (1, 7)], ids=str)
def test_every_panel_is_on_the_sheet_at_its_size(size):
    red, green = (0.8, 0.1, 0.1), (0.1, 0.6, 0.2)
    drawn = sheet(panels(red, green, size=size), spectra(), 0.125, heading="a heading", side=200)
    assert drawn.ndim == 3
    assert 0 <= drawn.min() < drawn.max() <= 1
    scale = 200 / max(size)
    expected = max(1, round(size[0] * scale)) * max(1, round(size[1] * scale))
    # One row and column of pixels may be shared with the paper.
    for color in (red, green):
        assert count(drawn, color) == pytest.approx(expected, abs=2 * sum(size) * scale + 4)


def test_small_images_grow_with_hard_pixels_and_large_ones_are_averaged():
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2.0
    (small,) = panels((0.0, 0.0, 0.0), size=(8, 8))
    drawn = sheet([Panel("board", board.expand(3, 8, 8))], spectra(), 0.1, side=240)
    assert count(drawn, (0.5, 0.5, 0.5)) < 200
    fine = (torch.arange(480)[:, None] + torch.arange(480)) % 2.0
    drawn = sheet([Panel("board", fine.expand(3, 480, 480))], spectra(), 0.1, side=240)
    assert count(drawn, (0.5, 0.5, 0.5)) > 240 * 240 * 0.95
    assert small.image.shape == (3, 8, 8)


def test_a_difference_fills_the_range_and_the_factor_is_the_one_applied():
    difference = torch.linspace(-0.01, 0.01, 1001).view(1, 1, -1)
    factor = contrast_factor(difference)
    assert factor == pytest.approx(50, rel=0.05)
    assert f"{factor:g}" == f"{float(f'{factor:.2g}'):g}"
    shown = difference_image(difference, factor)
    torch.testing.assert_close(shown, (0.5 + factor * difference).clamp(0, 1))
    assert shown.min() < 0.02
    assert shown.max() > 0.98


@pytest.mark.parametrize("nothing", [torch.zeros(3, 8, 8), torch.full((3, 8, 8), 1e-6)])
def test_nothing_is_not_blown_up(nothing):
    assert contrast_factor(nothing) == 1


def test_a_few_large_values_among_zeros_count():
    difference = torch.zeros(3, 100, 100)
    difference[0, 0, :10] = 0.5
    assert contrast_factor(difference) == 1
    difference *= 0.1
    assert contrast_factor(difference) == 10


def test_large_differences_are_measured_in_parts():
    assert contrast_factor(torch.full((3, 3000, 3000), 0.25)) == 2


def test_the_plot_of_two_spectra_shows_both_and_the_boundary():
    comparison = compare_spectra(torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32) * 5, BandSpec())
    drawn = spectrum_plot(comparison, "db3")
    assert drawn.shape == (560, 900, 3)
    orange, black, boundary = (0.902, 0.624, 0.0), (0.0, 0.0, 0.0), (0.8, 0.475, 0.655)
    assert count(drawn, orange) > 100
    assert count(drawn, black) > 100
    assert count(drawn, boundary) > 50


def test_the_error_map_is_bright_where_the_error_is():
    difference = torch.zeros(4, 32, 32)
    difference[:, 4:8, 4:8] = 1
    maps = band_error_maps(difference, BandSpec())
    drawn = error_map_plot(maps, FrequencyLoss(torch.tensor(0.1), maps.low.mean(), maps.high.mean()), "total = 0.1")
    high, wide = drawn.shape[:2]
    left = drawn[:, : wide // 2].sum(dim=-1)
    corner, opposite = left[high // 6 : high // 3, : wide // 8], left[high // 2 : -20, wide // 6 : wide // 3]
    assert corner.max() > opposite.max() + 0.5


def test_an_error_of_nothing_can_be_drawn():
    nothing = Bands(torch.zeros(8, 8), torch.zeros(8, 8))
    zero = torch.tensor(0.0)
    assert error_map_plot(nothing, FrequencyLoss(zero, zero, zero), "total = 0").isfinite().all()


def test_without_matplotlib_one_line_says_what_to_install():
    code = """
import sys
sys.modules["matplotlib"] = None
from freq_loss_plugin.analysis import figures
try:
    figures.new_figure(10, 10)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("plots need matplotlib, which cannot be imported")
    assert done.stdout.rstrip().endswith(": pip install matplotlib")
