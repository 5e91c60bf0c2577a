"""Radial power spectra: how much of a set of pictures or latents lies at which frequency."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RadialSpectrum(NamedTuple):
    """``frequency`` in cycles per pixel, and the mean ``power`` in the ring around it; both of shape (n,)."""

    frequency: Tensor
    power: Tensor


def radial_power_spectrum(pictures: Tensor) -> RadialSpectrum:
    r"""The power spectrum of pictures, averaged over pictures, channels and directions.

    .. math:: P(f_k) = \operatorname{mean}_{b, c, |f| \in ring_k} \frac{|F_{bc}(f)|^2}{HW}, \quad
              ring_k = \{f : (k - \tfrac12)/n \le |f| < (k + \tfrac12)/n\}, \quad n = \min(H, W), \quad k = 1 \dots n/2

    with F the two-dimensional Fourier transform without scaling, so that white noise of variance 1 has P = 1
    everywhere. The mean of a picture (frequency 0) is left out.

    Args:
        pictures: shape (B, C, H, W).

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
    if pictures.ndim != 4 or min(pictures.shape[-2:]) < 2:
        raise ValueError(f"pictures have shape {tuple(pictures.shape)}: expected (B, C, H, W) with sides of at least 2")
    height, width = pictures.shape[-2:]
    power = torch.fft.fft2(pictures.float()).abs().square().mean(dim=(0, 1)) / (height * width)
    rows = torch.fft.fftfreq(height, device=power.device)[:, None]
    columns = torch.fft.fftfreq(width, device=power.device)[None, :]
    shortest = min(height, width)
    ring = (torch.hypot(rows, columns) * shortest + 0.5).long().flatten()
    count = shortest // 2 + 1
    inside = ring < count
    sums = torch.zeros(count, device=power.device).index_add_(0, ring[inside], power.flatten()[inside])
    sizes = torch.bincount(ring[inside], minlength=count)
    return RadialSpectrum((torch.arange(count, device=power.device) / shortest)[1:], (sums / sizes)[1:])
