"""Radial spectra against what is known of white noise, waves and NumPy's transform."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from freq_loss_plugin import BandSpec
from freq_loss_plugin.analysis.spectra import compare_spectra, radial_power_spectrum


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
    images = np.random.default_rng(0).normal(size=(2, 3, 20, 33))
    power = (abs(np.fft.fft2(images)) ** 2).mean(axis=(0, 1)) / (20 * 33)
    radius = np.hypot(np.fft.fftfreq(20)[:, None], np.fft.fftfreq(33)[None, :]) * 20
    expected = [power[(radius >= k - 0.5) & (radius < k + 0.5)].mean() for k in range(1, 11)]
    assert radial_power_spectrum(torch.from_numpy(images)).power.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_mean_of_an_image_does_not_count():
    image = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        radial_power_spectrum(image).power, radial_power_spectrum(image + 5).power, rtol=1e-3, atol=1e-5
    )


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(3, 16, 16\).*\(B, C, H, W\)"):
        radial_power_spectrum(torch.zeros(3, 16, 16))


def sets(*shapes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("method", ["wavelet", "fft"])
def test_equal_sets_have_distance_zero_and_a_gain_is_its_decibels(method):
    (images,) = sets((3, 3, 32, 48))
    spec = BandSpec(method=method)
    assert compare_spectra(images, images.clone(), spec).distance == 0
    louder = compare_spectra(images * 10, images, spec)
    for band in louder.bands:
        assert (band.ratio, band.distance) == pytest.approx((20, 20), abs=1e-3)
        assert band.fraction_a == pytest.approx(band.fraction_b)


def test_what_one_band_loses_shows_in_that_band():
    from freq_loss_plugin.analysis.mixing import scale_bands

    spec = BandSpec(method="fft")
    (images,) = sets((4, 1, 64, 64))
    low, high, both = compare_spectra(scale_bands(images, 1, 0.1, spec), images, spec).bands
    assert (low.ratio, high.ratio) == pytest.approx((0, -20), abs=0.1)
    assert low.distance < 1 < both.distance < high.distance
    assert high.distance == pytest.approx(20, abs=0.5)
    assert low.fraction_a > 0.9 > low.fraction_b
    assert low.fraction_a + high.fraction_a == pytest.approx(1)


def test_sets_of_other_sizes_are_compared_per_pixel():
    noise, larger = sets((20, 2, 32, 32), (20, 2, 64, 48))
    comparison = compare_spectra(noise, larger, BandSpec())
    assert len(comparison.a.frequency) == 16 < len(comparison.b.frequency)
    assert comparison.distance < 1


def test_the_frames_of_a_video_are_images_and_each_is_reported_once():
    (video,) = sets((2, 4, 3, 16, 16))
    images = video.transpose(1, 2).reshape(6, 4, 16, 16)
    seen = []
    comparison = compare_spectra(video, images, BandSpec(), on_image=lambda: seen.append(1))
    assert comparison.distance == pytest.approx(0, abs=1e-4)
    assert len(seen) == 12


def test_images_of_one_color_are_no_reason_to_fail():
    (noise,) = sets((1, 3, 16, 16))
    comparison = compare_spectra(torch.full((1, 3, 16, 16), 0.3), noise, BandSpec())
    assert 50 < comparison.distance < 200
    assert len(comparison.table().splitlines()) == 4


def test_the_mean_of_the_images_does_not_count_as_variance():
    (noise,) = sets((1, 3, 32, 32))
    for first, second in zip(
        compare_spectra(noise, noise, BandSpec()).bands,
        compare_spectra(noise + 7, noise, BandSpec()).bands,
        strict=True,
    ):
        assert first.fraction_a == pytest.approx(second.fraction_a, abs=1e-4)


def test_the_table_says_what_the_numbers_are():
    a, b = sets((2, 1, 16, 16), (2, 1, 16, 16))
    comparison = compare_spectra(a, b, BandSpec())
    header, *rows = comparison.table().splitlines()
    assert header.split() == ["band", "A", "B", "A", "/", "B", "distance"]
    for row, band in zip(rows, comparison.bands, strict=True):
        name, fraction_a, _fraction_b, ratio, _, distance, _ = row.split()
        assert name == band.name
        assert float(fraction_a.rstrip("%")) == pytest.approx(100 * band.fraction_a, abs=0.05)
        assert (float(ratio), float(distance)) == pytest.approx((band.ratio, band.distance), abs=0.005)


def test_boundaries():
    assert BandSpec(levels=2).boundary(64, 64) == 1 / 8
    assert BandSpec(levels=1).boundary(64, 64) == 1 / 4
    assert BandSpec(method="fft", cutoff=0.29).boundary(100, 200) == 0.29


def test_sets_that_cannot_be_compared_are_refused():
    a, b = sets((1, 4, 16, 16), (1, 16, 16, 16))
    with pytest.raises(ValueError, match="A has 4 channels and B 16"):
        compare_spectra(a, b, BandSpec())
    with pytest.raises(ValueError, match="at least 32 × 32"):
        compare_spectra(a, a, BandSpec(levels=5))
