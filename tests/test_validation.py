"""The bands of a validation against the formula and the spectra they are made of."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.analysis.spectra import compare_spectra
from freq_loss_plugin.training.validation import ValidationBands


def test_numbers_are_those_of_the_loss_over_batches_in_the_window():
    bands, config = ValidationBands(FreqLossConfig()), FreqLossConfig()
    generator = torch.Generator().manual_seed(0)
    predicted, clean, energies = [], [], []
    for timestep, count in ((300, 3), (500, 2), (100, 3), (600, 3)):
        latents, residual = torch.randn(2, count, 4, 16, 16, generator=generator)
        scale = torch.linspace(0.5, 1.0, count)
        bands.add(latents, residual, scale, torch.full((count,), timestep))
        if not 200 <= timestep < 600:
            continue
        errors = scale.view(-1, 1, 1, 1) * residual
        low, high = oracle.wavelet_bands(errors.sum(dim=0).double().numpy())
        energies.append(((low**2).mean(), (high**2).mean()))
        predicted.append(latents + errors)
        clean.append(latents)
    result = bands.finish()
    expected = np.mean(energies, axis=0)
    assert [result.numbers["low"], result.numbers["high"]] == pytest.approx(list(expected), rel=1e-4)
    low, high, _ = compare_spectra(torch.cat(predicted), torch.cat(clean), config.bands).bands
    assert result.numbers["spectrum_low"] == pytest.approx(low.distance)
    assert result.numbers["spectrum_high"] == pytest.approx(high.distance)
    assert bands.finish() is None  # it begins anew


def test_samples_outside_the_window_do_not_count_within_a_batch():
    latents, residual = torch.randn(2, 3, 4, 16, 16)
    timesteps = torch.tensor([250, 700, 599])
    mixed, alone = ValidationBands(FreqLossConfig()), ValidationBands(FreqLossConfig())
    mixed.add(latents, residual, 0.7, timesteps)
    alone.add(latents[[0, 2]], residual[[0, 2]], 0.7, 400)
    assert mixed.finish().numbers == pytest.approx(alone.finish().numbers)


def test_a_blurred_prediction_has_a_distance_in_the_high_band():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(8, 4, 32, 32, generator=generator)
    bands = ValidationBands(FreqLossConfig())
    blurred = torch.nn.functional.avg_pool2d(clean, 3, stride=1, padding=1)
    bands.add(clean, blurred - clean, 1.0, 400)
    numbers = bands.finish().numbers
    assert numbers["spectrum_high"] > 5 > numbers["spectrum_low"]


def test_sizes_are_compared_each_for_itself_and_weighed_by_their_images():
    bands = ValidationBands(FreqLossConfig())
    numbers = []
    for count, shape in ((6, (4, 16, 16)), (2, (4, 8, 24))):
        latents, residual = torch.randn(2, count, *shape, generator=torch.Generator().manual_seed(count))
        for target in (bands, alone := ValidationBands(FreqLossConfig())):
            target.add(latents, residual, 1.0, 400)
        numbers.append(alone.finish().numbers)
    found = bands.finish()
    for name, weights in {"low": (1, 1), "high": (1, 1), "spectrum_low": (6, 2), "spectrum_high": (6, 2)}.items():
        expected = np.average([each[name] for each in numbers], weights=weights)
        assert found.numbers[name] == pytest.approx(expected, rel=1e-5)
    assert len(found.spectra.a.frequency) == 8  # of the size with more images
