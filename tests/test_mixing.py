"""Splitting, merging, scaling and mixing bands: the identities that make them what they are called."""

from __future__ import annotations

import pytest
import torch

from freq_loss_plugin import BandSpec, frequency_decomposition
from freq_loss_plugin.analysis.mixing import merge_bands, mix_bands, scale_bands

SPECS = [BandSpec(), BandSpec(method="fft", cutoff=0.1), BandSpec(wavelet="haar", levels=1)]
SHAPES = [(2, 4, 16, 24), (1, 16, 3, 13, 8)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}

each_spec = pytest.mark.parametrize("spec", SPECS, ids=["db3", "fft", "haar"])
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["latents", "video"])


@each_spec
@each_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_what_was_split_gives_it_back(spec, shape, dtype):
    latents = torch.randn(shape).to(dtype)
    bands = spec.split(latents)
    merged = merge_bands(*bands)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged, latents, atol=TOLERANCE[dtype], rtol=0)


@each_spec
def test_the_bands_are_those_of_the_loss(spec):
    latents = torch.randn(2, 4, 16, 16)
    expected = frequency_decomposition(latents, spec.method, spec.wavelet, spec.levels, cutoff=spec.cutoff)
    for band, wanted in zip(spec.split(latents), expected, strict=True):
        assert torch.equal(band, wanted)


@each_spec
@each_shape
@pytest.mark.parametrize("gains", [(0.0, 1.0), (1.0, 0.0), (1.0, 2.5), (-1.0, 0.5)], ids=str)
def test_scaling_is_splitting_and_merging_with_gains(spec, shape, gains):
    latents = torch.randn(shape)
    torch.testing.assert_close(
        scale_bands(latents, *gains, spec), merge_bands(*spec.split(latents), *gains), atol=1e-5, rtol=1e-5
    )


def test_equal_gains_split_nothing():
    latents = torch.randn(1, 4, 2, 2).half()
    too_many = BandSpec(levels=8)
    assert torch.equal(scale_bands(latents, 1.0, 1.0, too_many), latents)
    assert torch.equal(scale_bands(latents, 2.0, 2.0, too_many), latents * 2)


@each_spec
@each_shape
def test_a_mix_has_the_low_band_of_one_and_the_high_band_of_the_other(spec, shape):
    first, second = torch.randn(shape), torch.randn(shape)
    expected = spec.split(first).low + spec.split(second).high
    torch.testing.assert_close(mix_bands(first, second, spec), expected, atol=1e-5, rtol=1e-5)


def test_a_mix_of_one_is_that_one_exactly():
    latents = torch.randn(2, 4, 16, 16).bfloat16()
    assert torch.equal(mix_bands(latents, latents.clone(), BandSpec()), latents)


@pytest.mark.parametrize("function", [merge_bands, lambda a, b: mix_bands(a, b, BandSpec())])
def test_other_shapes_are_refused(function):
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\).*\(1, 4, 8, 9\).*same shape"):
        function(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 9))


def test_too_small_latents_are_refused_with_the_most_that_fits():
    with pytest.raises(ValueError, match=r"at least 8 × 8, and these are 7 × 20.*levels = 2"):
        BandSpec(levels=3).split(torch.zeros(1, 4, 7, 20))
