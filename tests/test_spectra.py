"""Radial spectra against what is known of white noise, waves and NumPy's transform."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from freq_loss_plugin import ConfigError, FreqLossConfig
from freq_loss_plugin.spectra import band_boundary, compare_spectra, radial_power_spectrum


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


def sets(*shapes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("method", ["wavelet", "fft"])
def test_equal_sets_have_distance_zero_and_a_gain_is_its_decibels(method):
    (pictures,) = sets((3, 3, 32, 48))
    config = FreqLossConfig(method=method)
    assert compare_spectra(pictures, pictures.clone(), config).distance == 0
    louder = compare_spectra(pictures * 10, pictures, config)
    for band in louder.bands:
        assert (band.ratio, band.distance) == pytest.approx((20, 20), abs=1e-3)
        assert band.share_a == pytest.approx(band.share_b)


def test_what_one_band_loses_shows_in_that_band():
    from freq_loss_plugin.shaping import scale_bands

    config = FreqLossConfig(method="fft")
    (pictures,) = sets((4, 1, 64, 64))
    low, high, both = compare_spectra(scale_bands(pictures, 1, 0.1, config), pictures, config).bands
    assert (low.ratio, high.ratio) == pytest.approx((0, -20), abs=0.1)
    assert low.distance < 1 < both.distance < high.distance
    assert high.distance == pytest.approx(20, abs=0.5)
    assert low.share_a > 0.9 > low.share_b
    assert low.share_a + high.share_a == pytest.approx(1)


def test_sets_of_other_sizes_are_compared_per_pixel():
    noise, larger = sets((20, 2, 32, 32), (20, 2, 64, 48))
    comparison = compare_spectra(noise, larger, FreqLossConfig())
    assert len(comparison.a.frequency) == 16 < len(comparison.b.frequency)
    assert comparison.distance < 1


def test_the_frames_of_a_video_are_pictures_and_each_is_reported_once():
    (video,) = sets((2, 4, 3, 16, 16))
    pictures = video.transpose(1, 2).reshape(6, 4, 16, 16)
    seen = []
    comparison = compare_spectra(video, pictures, FreqLossConfig(), on_picture=lambda: seen.append(1))
    assert comparison.distance == pytest.approx(0, abs=1e-4)
    assert len(seen) == 12


def test_pictures_of_one_colour_are_no_reason_to_fail():
    (noise,) = sets((1, 3, 16, 16))
    comparison = compare_spectra(torch.full((1, 3, 16, 16), 0.3), noise, FreqLossConfig())
    assert 50 < comparison.distance < 200
    assert len(comparison.table().splitlines()) == 4


def test_the_mean_of_the_pictures_has_no_share():
    (noise,) = sets((1, 3, 32, 32))
    for first, second in zip(
        compare_spectra(noise, noise, FreqLossConfig()).bands,
        compare_spectra(noise + 7, noise, FreqLossConfig()).bands,
        strict=True,
    ):
        assert first.share_a == pytest.approx(second.share_a, abs=1e-4)


def test_the_table_says_what_the_numbers_are():
    a, b = sets((2, 1, 16, 16), (2, 1, 16, 16))
    comparison = compare_spectra(a, b, FreqLossConfig())
    header, *rows = comparison.table().splitlines()
    assert header.split() == ["band", "A", "B", "A", "/", "B", "distance"]
    for row, band in zip(rows, comparison.bands, strict=True):
        name, share_a, _share_b, ratio, _, distance, _ = row.split()
        assert name == band.name
        assert float(share_a.rstrip("%")) == pytest.approx(100 * band.share_a, abs=0.05)
        assert (float(ratio), float(distance)) == pytest.approx((band.ratio, band.distance), abs=0.005)


def test_boundaries():
    assert band_boundary(FreqLossConfig(levels=2), 64, 64) == 1 / 8
    assert band_boundary(FreqLossConfig(levels=1), 64, 64) == 1 / 4
    assert band_boundary(FreqLossConfig(method="fft", cutoff=0.29), 100, 200) == 0.29


def test_sets_that_cannot_be_compared_are_refused():
    a, b = sets((1, 4, 16, 16), (1, 16, 16, 16))
    with pytest.raises(ValueError, match="A has 4 channels and B 16"):
        compare_spectra(a, b, FreqLossConfig())
    with pytest.raises(ConfigError, match="at least 32 × 32"):
        compare_spectra(a, a, FreqLossConfig(levels=5))
