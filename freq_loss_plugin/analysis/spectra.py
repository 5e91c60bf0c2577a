"""Radial power spectra of sets of images or latents, and how two sets differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..loss.params import BandSpec

# Far below the noise power of 8-bit images (1/255² / 12 = 1.3e-6), and above that of float32.
_FLOOR = 1e-10


class RadialSpectrum(NamedTuple):
    """``frequency`` in cycles per pixel, and the mean ``power`` in the ring around it; both of shape (n,)."""

    frequency: Tensor
    power: Tensor


class BandComparison(NamedTuple):
    """One band of two sets A and B."""

    name: str
    fraction_a: float
    """The fraction of A's variance that lies in this band, 0..1."""
    fraction_b: float
    ratio: float
    """10·log10 of the mean energy of A's band over that of B's, in dB."""
    distance: float
    """Log-spectral distance over the frequencies of this band, in dB."""


class SpectrumComparison(NamedTuple):
    """The result of `compare_spectra`."""

    a: RadialSpectrum
    b: RadialSpectrum
    boundary: float
    bands: tuple[BandComparison, BandComparison, BandComparison]

    @property
    def distance(self) -> float:
        """Log-spectral distance over all frequencies, in dB; 0 for equal spectra."""
        return self.bands[-1].distance

    def table(self) -> str:
        """A table of the bands in plain text."""
        rows = [
            f"{band.name:<5}{band.fraction_a:>10.1%}{band.fraction_b:>10.1%}"
            f"{band.ratio:>+9.2f} dB{band.distance:>10.2f} dB"
            for band in self.bands
        ]
        return "\n".join([f"{'band':<5}{'A':>10}{'B':>10}{'A / B':>12}{'distance':>13}", *rows])


def radial_power_spectrum(images: Tensor) -> RadialSpectrum:
    r"""The power spectrum of images, averaged over images, channels and directions.

    .. math:: P(f_k) = \operatorname{mean}_{b, c, |f| \in ring_k} \frac{|F_{bc}(f)|^2}{HW}, \quad
              ring_k = \{f : (k - \tfrac12)/n \le |f| < (k + \tfrac12)/n\}, \quad n = \min(H, W), \quad k = 1 \dots n/2

    with F the two-dimensional Fourier transform without scaling, so that white noise of variance 1 has P = 1
    everywhere. The mean of an image (frequency 0) is left out.

    Args:
        images: shape (B, C, H, W).

    Returns:
        ``RadialSpectrum``; frequencies from 1/n to 1/2.

    Raises:
        ValueError: not four axes, or a side below 2.

    Example:
        >>> waves = torch.sin(torch.arange(64) * 2 * torch.pi / 16).expand(1, 1, 64, 64)
        >>> spectrum = radial_power_spectrum(waves)
        >>> 1 / spectrum.frequency[spectrum.power.argmax()].item()
        16.0
    """
    if images.ndim != 4 or min(images.shape[-2:]) < 2:
        raise ValueError(f"images have shape {tuple(images.shape)}: expected (B, C, H, W) with sides of at least 2")
    height, width = images.shape[-2:]
    power = torch.fft.fft2(images.float()).abs().square().mean(dim=(0, 1)) / (height * width)
    rows = torch.fft.fftfreq(height, device=power.device)[:, None]
    columns = torch.fft.fftfreq(width, device=power.device)[None, :]
    shortest = min(height, width)
    ring = (torch.hypot(rows, columns) * shortest + 0.5).long().flatten()
    count = shortest // 2 + 1
    inside = ring < count
    sums = torch.zeros(count, device=power.device).index_add_(0, ring[inside], power.flatten()[inside])
    sizes = torch.bincount(ring[inside], minlength=count)
    return RadialSpectrum((torch.arange(count, device=power.device) / shortest)[1:], (sums / sizes)[1:])


def compare_spectra(
    a: Tensor, b: Tensor, spec: BandSpec, *, on_image: Callable[[], None] = lambda: None
) -> SpectrumComparison:
    r"""Compare two sets of images or latents frequency by frequency and band by band.

    .. math:: distance = \sqrt{\operatorname{mean}_k \left(10 \log_{10} \frac{P_A(f_k)}{P_B(f_k)}\right)^2}

    the log-spectral distance, over the frequencies of the set with fewer of them (the other spectrum is interpolated).
    A band's energy is that of the deviations from each image's own mean, in the bands of the loss.

    Args:
        a: shape (B, C, H, W) or (B, C, T, H, W), whose frames count as images.
        b: the same number of channels; B, H, W and T may differ.
        spec: the bands.
        on_image: called once for each image of both sets; an exception in it ends the comparison.

    Raises:
        ValueError: an image is too small for the wavelet levels, or the numbers of channels differ.

    Example:
        >>> images = torch.rand(2, 3, 32, 32)
        >>> comparison = compare_spectra(images, 2 * images, BandSpec())
        >>> round(comparison.distance, 2)
        6.02
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"A has {a.shape[1]} channels and B {b.shape[1]}: expected the same number")
    spectrum_a, energies_a = _measure(a, spec, on_image)
    spectrum_b, energies_b = _measure(b, spec, on_image)
    boundary = spec.boundary(*min(a.shape[-2:], b.shape[-2:], key=min))
    coarser = min(spectrum_a.frequency, spectrum_b.frequency, key=len)
    decibels = _decibels(_interpolated_power(coarser, spectrum_a)) - _decibels(_interpolated_power(coarser, spectrum_b))
    low = coarser <= boundary
    bands = (
        _compare_band("low", energies_a[0], energies_b[0], sum(energies_a), sum(energies_b), decibels[low]),
        _compare_band("high", energies_a[1], energies_b[1], sum(energies_a), sum(energies_b), decibels[~low]),
        _compare_band("all", *2 * (sum(energies_a), sum(energies_b)), decibels),
    )
    return SpectrumComparison(spectrum_a, spectrum_b, boundary, bands)


def _measure(
    images: Tensor, spec: BandSpec, on_image: Callable[[], None]
) -> tuple[RadialSpectrum, tuple[float, float]]:
    """The spectrum of a set and the mean energies of its two bands; one image at a time, to save memory."""
    if images.ndim == 5:
        images = images.transpose(1, 2).flatten(end_dim=1)
    power, energies = torch.zeros(()), torch.zeros(2, dtype=torch.float64)
    for number in range(len(images)):
        on_image()
        image = images[number : number + 1].float()
        spectrum = radial_power_spectrum(image)
        power = power + spectrum.power.cpu() / len(images)
        deviations = image - image.mean(dim=(-2, -1), keepdim=True)
        bands = spec.split(deviations)
        energies += torch.stack([band.square().mean().cpu().double() for band in bands]) / len(images)
    low, high = energies.tolist()
    return RadialSpectrum(spectrum.frequency.cpu(), power), (low, high)


def _compare_band(name: str, a: float, b: float, total_a: float, total_b: float, decibels: Tensor) -> BandComparison:
    ratio = float(_decibels(torch.tensor(a)) - _decibels(torch.tensor(b)))
    distance = float(decibels.square().mean().sqrt()) if len(decibels) else 0.0
    return BandComparison(name, a / max(total_a, _FLOOR), b / max(total_b, _FLOOR), ratio, distance)


def _interpolated_power(frequency: Tensor, spectrum: RadialSpectrum) -> Tensor:
    """The power at other frequencies, by linear interpolation."""
    power = np.interp(frequency.numpy(), spectrum.frequency.numpy(), spectrum.power.numpy())
    return torch.from_numpy(power).to(spectrum.power.dtype)


def _decibels(power: Tensor) -> Tensor:
    return 10 * torch.log10(power.clamp(min=_FLOOR))
