"""Radial spectra against what is known of white noise, waves and NumPy's transform."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from freq_loss_plugin.spectra import radial_power_spectrum


def test_white_noise_has_power_one_everywhere():
    noise = torch.randn(64, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    spectrum = radial_power_spectrum(noise)
    assert spectrum.frequency.tolist() == pytest.approx([k / 32 for k in range(1, 17)])
    assert spectrum.power[1:].tolist() == pytest.approx([1.0] * 15, abs=0.1)


@pytest.mark.parametrize("period", [4, 8, 16])
def test_a_wave_is_found_at_its_frequency(period):
    wave = torch.sin(2 * torch.pi * torch.arange(64) / period).expand(1, 1, 64, 64).transpose(2, 3)
    spectrum = radial_power_spectrum(wave)
    assert spectrum.frequency[spectrum.power.argmax()].item() == 1 / period
    assert spectrum.power.max() > 1e6 * spectrum.power.median()


def test_it_is_the_mean_over_rings_of_numpys_transform():
    pictures = np.random.default_rng(0).normal(size=(2, 3, 20, 33))
    power = (abs(np.fft.fft2(pictures)) ** 2).mean(axis=(0, 1)) / (20 * 33)
    radius = np.hypot(np.fft.fftfreq(20)[:, None], np.fft.fftfreq(33)[None, :]) * 20
    expected = [power[(radius >= k - 0.5) & (radius < k + 0.5)].mean() for k in range(1, 11)]
    assert radial_power_spectrum(torch.from_numpy(pictures)).power.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_mean_of_a_picture_does_not_count():
    picture = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        radial_power_spectrum(picture).power, radial_power_spectrum(picture + 5).power, rtol=1e-3, atol=1e-5
    )


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(3, 16, 16\).*\(B, C, H, W\)"):
        radial_power_spectrum(torch.zeros(3, 16, 16))
