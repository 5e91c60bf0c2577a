r"""The power spectrum of an image against the power law that natural images and drawings follow.

.. math:: P(f) \propto f^{-n}, \quad 0 < n \le 3

Photographs have n of about 2, flat shapes with sharp outlines 3. A spectrum that falls faster from its lowest octaves
on belongs to an image that is soft by nature: a cell, a color wheel. Nothing can be said about such an image.

Source: D. J. Field (1987), Relations between the statistics of natural images and the response properties of cortical
cells, JOSA A 4.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..analysis.spectra import RadialSpectrum, radial_power_spectrum
from .pixels import as_floats

# The octaves to which the law is fitted begin here, in cycles per image side, and are three; or fewer, at least one,
# where a blur takes more than this many nepers of power out of the others.
_FIRST, _MOST_LOSS = 3, 1.0
_STEEPEST = 3.0
# An image with a shorter side than this has no octave to fit.
LEAST_SIDE = 16
# A fit that is steeper than this is no such law, which for flat shapes comes out between 2.7 and 3.4; a fit over fewer
# than two octaves is less certain.
_STEEPEST_FITS = 3.5, 4.5


class SpectrumFit(NamedTuple):
    """A spectrum and the law that its lowest octaves follow.

    Attributes:
        spectrum: of the mean of the image's channels, windowed.
        exponent: n of the fit, without the blur.
        expected: the power that the law expects at the frequencies of ``spectrum``, n being at most 3.
        is_a_law: whether photographs and drawings fall off like this.
    """

    spectrum: RadialSpectrum
    exponent: float
    expected: Tensor
    is_a_law: bool


def fit_power_law(pixels: Tensor, blur: float = 0.0) -> SpectrumFit:
    """Fit a power law to the lowest octaves of an image's spectrum.

    Args:
        pixels: shape (C, H, W), bytes or 0..1, sides of at least `LEAST_SIDE`.
        blur: sigma in pixels of a Gaussian whose effect on these octaves is taken out of the fit.
    """
    pixels = as_floats(pixels).mean(dim=0, keepdim=True)
    height, width = pixels.shape[1:]
    window = torch.outer(torch.hann_window(height, periodic=False), torch.hann_window(width, periodic=False))
    mean = (pixels * window).sum(dim=(1, 2), keepdim=True) / window.sum()
    spectrum = radial_power_spectrum(((pixels - mean) * window)[None])
    spectrum = spectrum._replace(power=spectrum.power / window.square().mean())
    frequency, power = spectrum.frequency.double(), spectrum.power.double().clamp(min=1e-12)
    first = _FIRST / min(height, width)
    loss = (2 * math.pi * blur * frequency).square()
    end = torch.where(loss < _MOST_LOSS, frequency, 0).max().clamp(2 * first, 8 * first)
    fitted = (frequency >= first * 0.99) & (frequency <= end)
    sharp = power.log() + loss
    # Rings are narrow at high frequencies; so each octave counts alike.
    weights = 1 / frequency[fitted]
    x, y = frequency[fitted].log(), sharp[fitted]
    x_mean, y_mean = ((weights * values).sum() / weights.sum() for values in (x, y))
    exponent = -float((weights * (x - x_mean) * (y - y_mean)).sum() / (weights * (x - x_mean).square()).sum())
    slope = min(max(exponent, 0.0), _STEEPEST)
    expected = torch.exp(y_mean - slope * (frequency.log() - x_mean))
    steepest = _STEEPEST_FITS[0 if end > 3.9 * first else 1]
    return SpectrumFit(spectrum, exponent, expected.float(), exponent <= steepest)
