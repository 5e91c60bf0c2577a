"""The bands, compared with PyWavelets, pytorch_wavelets and NumPy's FFT; cache, fallback and errors."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import oracle
import pytest
import torch
from torch import autocast

from freq_loss_plugin import frequency_decomposition
from freq_loss_plugin.loss import bands, wavelet_library

SIZES = [(2, 2), (2, 5), (5, 3), (7, 113), (16, 16), (31, 40), (64, 64), (113, 7)]
WAVELETS = ["db3", "haar", "sym5", "bior2.4"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_wavelet_bands_are_those_of_pywavelets(size, wavelet, levels):
    latents = torch.randn(2, 3, *size, dtype=torch.float64)
    low, high = frequency_decomposition(latents, "wavelet", wavelet, levels)
    expected_low, expected_high = oracle.wavelet_bands(latents.numpy(), wavelet, levels)
    np.testing.assert_allclose(low.numpy(), expected_low, atol=1e-12)
    np.testing.assert_allclose(high.numpy(), expected_high, atol=1e-12)


def test_every_discrete_wavelet_works_and_only_dmey_is_no_perfect_reconstruction():
    latents = torch.randn(1, 1, 16, 16, dtype=torch.float64)
    imperfect = []
    for wavelet in wavelet_library.discrete_wavelets():
        low, high = frequency_decomposition(latents, "wavelet", wavelet, 1)
        expected_low, expected_high = oracle.wavelet_bands(latents.numpy(), wavelet, 1)
        np.testing.assert_allclose(low.numpy(), expected_low, atol=1e-10)
        torch.testing.assert_close(low + high, latents)
        if not np.allclose(high.numpy(), expected_high, atol=1e-8):
            imperfect.append(wavelet)
    assert imperfect == ["dmey"]


@pytest.mark.parametrize("size", [(64, 64), (31, 40), (13, 24)], ids=str)
def test_wavelet_bands_are_those_of_pytorch_wavelets_in_two_dimensions(size):
    library = wavelet_library.load()
    latents = torch.randn(2, 4, *size)
    forward, inverse = library.DWTForward(J=2, wave="db3", mode="zero"), library.DWTInverse(wave="db3", mode="zero")
    approximation, details = forward(latents)
    expected_low = inverse((approximation, [torch.zeros_like(detail) for detail in details]))[..., : size[0], : size[1]]
    expected_high = inverse((torch.zeros_like(approximation), details))[..., : size[0], : size[1]]
    low, high = frequency_decomposition(latents)
    torch.testing.assert_close(low, expected_low, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(high, expected_high, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cutoff", [0.05, 0.1, 0.25, 0.29, 0.5])
@pytest.mark.parametrize("size", [*SIZES, (100, 100)], ids=str)
def test_fft_bands_are_the_disc_of_the_shifted_spectrum(size, cutoff):
    latents = torch.randn(1, 2, *size, dtype=torch.float64)
    low, high = frequency_decomposition(latents, "fft", cutoff=cutoff)
    expected_low, expected_high = oracle.fft_bands(latents.numpy(), cutoff)
    np.testing.assert_allclose(low.numpy(), expected_low, atol=1e-12)
    np.testing.assert_allclose(high.numpy(), expected_high, atol=1e-12)


@pytest.mark.parametrize("method", bands.METHODS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 9, 12), (1, 2, 3, 8, 8)], ids=str)
def test_bands_keep_shape_and_dtype_and_add_up(method, dtype, shape):
    latents = torch.randn(shape).to(dtype)
    result = frequency_decomposition(latents, method)
    assert result._fields == ("low", "high")
    for band in result:
        assert band.shape == latents.shape
        assert band.dtype == dtype
    torch.testing.assert_close(result.low + result.high, latents, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("method", bands.METHODS)
def test_video_latents_are_split_frame_by_frame(method):
    video = torch.randn(2, 3, 4, 10, 14)
    low = frequency_decomposition(video, method).low
    for frame in range(4):
        torch.testing.assert_close(low[:, :, frame], frequency_decomposition(video[:, :, frame], method).low)


@pytest.mark.parametrize("method", bands.METHODS)
def test_a_constant_is_low_away_from_the_border_and_a_checkerboard_is_high(method):
    flat = torch.ones(1, 1, 64, 64)
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(32, 32)[None, None]
    inner = (..., slice(24, 40), slice(24, 40))
    assert frequency_decomposition(flat, method).high[inner].abs().max() < 1e-5
    assert frequency_decomposition(checks, method).low[inner].abs().max() < 1e-5


@pytest.mark.parametrize("method", bands.METHODS)
def test_gradients(method):
    latents = torch.randn(1, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(frequency_decomposition(x, method)), (latents,))


def test_float32_inside_autocast():
    latents = torch.randn(1, 4, 32, 32)
    with autocast("cpu", dtype=torch.bfloat16):
        inside = frequency_decomposition(latents).low
    torch.testing.assert_close(inside, frequency_decomposition(latents).low, atol=0, rtol=0)


def test_operators_are_made_once_per_size():
    bands.wavelet_low_pass.cache_clear()
    for _ in range(3):
        frequency_decomposition(torch.randn(1, 1, 22, 34))
    assert bands.wavelet_low_pass.cache_info().misses == 2


def test_operators_first_made_under_inference_mode_still_train():
    bands.wavelet_low_pass.cache_clear()
    with torch.inference_mode():
        frequency_decomposition(torch.randn(1, 1, 26, 26))
        frequency_decomposition(torch.randn(1, 1, 26, 26), "fft")
    for method in bands.METHODS:
        latents = torch.randn(1, 1, 26, 26, requires_grad=True)
        frequency_decomposition(latents, method).low.square().sum().backward()
        assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.zeros(1, 1, 8, 8, dtype=torch.int64),), TypeError, ["int64", "floating point"]),
        ((torch.zeros(8, 8),), ValueError, ["(8, 8)", "(B, C, H, W)"]),
        ((torch.zeros(1, 1, 8, 8), "wavlet"), ValueError, ["'wavlet'", "'wavelet'", "'fft'"]),
        ((torch.zeros(1, 1, 8, 8), "wavelet", "db33x"), ValueError, ["'db33x'", "Did you mean 'db3"]),
        ((torch.zeros(1, 1, 8, 8), "wavelet", "db3", 0), ValueError, ["J = 0", "at least 1"]),
    ],
)
def test_errors_name_what_was_received_and_expected(arguments, error, words):
    with pytest.raises(error) as caught:
        frequency_decomposition(*arguments)
    for word in words:
        assert word in str(caught.value)


def run_python(code: str, *flags: str) -> str:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_falls_back_to_fft_with_one_warning_naming_the_package():
    output = run_python(
        """
import sys, warnings
sys.modules["pytorch_wavelets"] = None
import torch
from torch import autocast
from freq_loss_plugin import FreqLossConfig, frequency_decomposition
latents = torch.randn(1, 1, 16, 16)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        fallen_back = frequency_decomposition(latents).low
    config = FreqLossConfig()
    print(config.method, config.resolved_method)
print(torch.equal(fallen_back, frequency_decomposition(latents, "fft").low))
print(len(caught), "pip install pytorch_wavelets" in str(caught[0].message))
"""
    )
    assert output.split() == ["wavelet", "fft", "True", "1", "True"]


# States of pkg_resources before pytorch_wavelets is imported.
PKG_RESOURCES = {
    "missing": """
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pkg_resources", "setuptools"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
""",
    "broken": """
class Break(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name == "pkg_resources" else None
    def exec_module(self, module):
        raise AttributeError("module 'pkgutil' has no attribute 'ImpImporter'")
sys.meta_path.insert(0, Break())
""",
    "empty": "sys.modules['pkg_resources'] = types.ModuleType('pkg_resources')",
    "forbidden": "sys.modules['pkg_resources'] = None",
}


@pytest.mark.parametrize("state", PKG_RESOURCES)
def test_pytorch_wavelets_loads_in_every_state_of_pkg_resources_and_does_not_change_it(state):
    output = run_python(
        f"""
import importlib.abc, importlib.util, sys, types
{PKG_RESOURCES[state]}
before = sys.modules.get("pkg_resources", "missing")
from freq_loss_plugin.loss import wavelet_library
library = wavelet_library.load()
print(library.__version__, sys.modules.get("pkg_resources", "missing") is before)
# pytorch_wavelets needs pkg_resources for the dual-tree coefficients, which must be readable.
print(library.DTCWTForward(J=2).h0o.numel() > 0)
"""
    )
    assert output.split() == [wavelet_library.load().__version__, "True", "True"]


@pytest.mark.parametrize("size", [(1025, 8), (30, 1100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_images_too_large_for_an_operator_have_the_same_bands(size, dtype):
    bands.wavelet_low_pass.cache_clear()
    images = torch.randn(2, 3, *size, dtype=dtype)
    low, high = frequency_decomposition(images)
    assert bands.wavelet_low_pass.cache_info().currsize == 0
    expected_low, expected_high = oracle.wavelet_bands(images.double().numpy())
    np.testing.assert_allclose(low.double().numpy(), expected_low, atol=3e-6)
    np.testing.assert_allclose(high.double().numpy(), expected_high, atol=3e-6)


@pytest.mark.parametrize("size", [(32, 32), (13, 24)], ids=str)
def test_the_low_bands_of_all_levels_are_those_of_each_number_of_levels(size):
    latents = torch.randn(2, 4, *size)
    lows = bands.low_bands(latents, J=3)
    assert len(lows) == 3
    for level, low in enumerate(lows, 1):
        torch.testing.assert_close(low, frequency_decomposition(latents, J=level).low)
    # The details of all levels and the last low band add up to the latents.
    details = [finer - coarser for finer, coarser in zip([latents, *lows], lows, strict=False)]
    torch.testing.assert_close(sum(details) + lows[-1], latents, atol=1e-5, rtol=1e-5)


def test_fft_has_one_low_band():
    latents = torch.randn(1, 4, 16, 16)
    (low,) = bands.low_bands(latents, "fft", J=3, cutoff=0.1)
    torch.testing.assert_close(low, frequency_decomposition(latents, "fft", cutoff=0.1).low)
