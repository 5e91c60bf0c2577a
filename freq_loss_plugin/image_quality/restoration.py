r"""Latents of defective images, brought as close to those of sharp images as a linear filter can, and what remains.

A defect does to the latents of one image what it does to those of another, mostly. So it is made on sharp reference
images, both versions are encoded, and one matrix over the channels is fitted for each ring of spatial frequencies. With
A and B the orthonormal 2-D Fourier transforms of latents with and without the defect, their mean over all references
taken from f = 0, and r(f) the ring of f (`RINGS` of equal width up to Nyquist, the corners beyond, and f = 0 alone)

.. math:: C_{ba}(r) = \operatorname{Re} \operatorname{mean}_{f \in r}\big(B A^H\big), \qquad
          M_r = (C_{ba} + \lambda I)(C_{aa} + \lambda I)^{-1}, \qquad
          \hat B(f) = M_{r(f)} A(f)

which is ridge regression towards the identity: where references say little, latents stay as they are. lambda is a
fraction of the mean diagonal of C_aa(r), ten times that at f = 0, where there is one sample for each reference. Of the
fractions in `RIDGES` that one is taken which has the least error on references that were left out of the fit one at a
time; with the last one, only the means move. E(r), the covariance of that error, is what remains. Where all of this
is no better than doing nothing, and with a single reference, nothing is done.

**The floor.** With S(r) the covariance over channels of sharp latents, q = SNR(t) and G = S(S + I/q)^{-1}, a denoiser
that learns from such images is off by at most bias = sum_f tr(G E G^T), where its own error on sharp ones is
mmse = sum_f tr(S(I + qS)^{-1}). The least timestep is the first from which on bias stays below a fraction of mmse.

Source: measurements of this project; G is the Wiener filter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

RINGS = 16
# See above.
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, math.inf)
_RIDGE_OF_MEAN = 10.0


@dataclass(frozen=True)
class Restoration:
    """A fitted filter.

    Attributes:
        matrices: M, shape (rings, C, C).
        mean_before: channel means of the references with the defect, shape (C,).
        mean_after: those without it.
        error: E, what remains, shape (rings, C, C).
        error_before: the same without restoring.
        sharp: S, shape (rings, C, C).
        ridge: the fraction that was chosen.
        counts: frequencies in each ring, the mean over references, shape (rings,).
    """

    matrices: Tensor
    mean_before: Tensor
    mean_after: Tensor
    error: Tensor
    error_before: Tensor
    sharp: Tensor
    ridge: float
    counts: Tensor
    _copies: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    @property
    def restored(self) -> float:
        """The fraction of the squared error that the filter takes back, 0..1."""
        before = _total(self.error_before, self.counts)
        return 1 - _total(self.error, self.counts) / before if before > 0 else 0.0

    def least_timestep(self, snr: Tensor, fraction: float) -> int:
        """The floor of what remains; see `least_timestep`."""
        return least_timestep(self.error, self.sharp, snr, fraction, self.counts)

    def apply(self, latents: Tensor) -> Tensor:
        """Restored latents, of the shape (..., C, H, W), dtype and device of ``latents``; any size.

        Nothing waits for the device, except when it or a size of latents is used there for the first time.
        """
        height, width = latents.shape[-2:]
        matrices, before, after = self._on(latents.device)
        by_ring, back, sizes = _order(height, width, latents.device)
        spectrum = torch.fft.rfft2(latents.float() - before, norm="ortho")
        rings = spectrum.flatten(-2)[..., by_ring].split(sizes, dim=-1)
        restored = torch.cat([matrix @ ring for matrix, ring in zip(matrices, rings, strict=True)], dim=-1)
        result = torch.fft.irfft2(restored[..., back].view_as(spectrum), s=(height, width), norm="ortho")
        return (result + after).to(latents.dtype)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The matrices, as complex numbers, and both means, shape (C, 1, 1), on a device."""
        if device not in self._copies:
            before, after = (mean.to(device)[:, None, None] for mean in (self.mean_before, self.mean_after))
            self._copies[device] = self.matrices.to(device, torch.complex64), before, after
        return self._copies[device]


def fit(sharp: Sequence[Tensor], defective: Sequence[Tensor]) -> Restoration:
    """The filter from latents with a defect to those without it.

    Args:
        sharp: latents of reference images, each of shape (C, H, W).
        defective: those of the same images with the defect, in the same order.

    Raises:
        ValueError: no references, or other shapes.
    """
    if not sharp or [one.shape for one in sharp] != [one.shape for one in defective]:
        raise ValueError(
            f"expected pairs of latents of equal shapes (C, H, W); got {len(sharp)} sharp ones and {len(defective)} "
            "with the defect"
        )
    pairs = [_Pair(before.double(), after.double()) for before, after in zip(defective, sharp, strict=True)]
    counts = torch.stack([pair.counts for pair in pairs]).mean(dim=0)
    (mean_before, mean_after), moments = _statistics(pairs)
    # What nothing changes: the identity, and no means taken out.
    identity = _matrices(moments, math.inf)
    before = torch.stack([_error(pair.around(torch.zeros(2, 1)), identity) for pair in pairs]).mean(dim=0)
    ridge, error = _best_ridge(pairs, counts) if len(pairs) > 1 else (math.inf, before)
    if _total(error, counts) >= _total(before, counts):
        ridge, error, mean_after = math.inf, before, mean_before
    tensors = _matrices(moments, ridge), mean_before, mean_after, error, before, moments.sharp
    matrices, mean_before, mean_after, error, before, sharp_moments = (tensor.float() for tensor in tensors)
    return Restoration(matrices, mean_before, mean_after, error, before, sharp_moments, ridge, counts)


def _best_ridge(pairs: Sequence[_Pair], counts: Tensor) -> tuple[float, Tensor]:
    """The ridge with the least error on references that are left out one at a time, and the covariance of that error.

    Args:
        pairs: two or more.
        counts: frequencies in each ring.
    """
    remaining = dict.fromkeys(RIDGES, torch.zeros(()))
    for number, pair in enumerate(pairs):
        means, moments = _statistics([*pairs[:number], *pairs[number + 1 :]])
        left_out = pair.around(means)
        for ridge in RIDGES:
            remaining[ridge] = remaining[ridge] + _error(left_out, _matrices(moments, ridge)) / len(pairs)
    best = min(RIDGES, key=lambda ridge: _total(remaining[ridge], counts))
    return best, remaining[best]


def least_timestep(error: Tensor, sharp: Tensor, snr: Tensor, fraction: float, counts: Tensor | None = None) -> int:
    """The first timestep from which on bias / mmse stays below ``fraction``; see the head of this module.

    Args:
        error: E, shape (rings, C, C).
        sharp: S, of the same shape.
        snr: see `freq_loss_plugin.image_quality.noise_schedules.signal_to_noise`, shape (1000,).
        fraction: above 0.
        counts: frequencies in each ring, shape (rings,); those of latents of 64×64 where left out.
    """
    counts = frequencies_per_ring(64, 64) if counts is None else counts
    values, vectors = torch.linalg.eigh(sharp.double())
    values = values.clamp(min=1e-8)
    rotated = torch.einsum("rji,rjk,rkl->ril", vectors, error.double(), vectors)
    variance = torch.diagonal(rotated, dim1=1, dim2=2).clamp(min=0)
    q = snr.double()[:, None, None]
    gain = q * values / (1 + q * values)
    bias = ((gain.square() * variance).sum(dim=2) * counts).sum(dim=1)
    mmse = ((values / (1 + q * values)).sum(dim=2) * counts).sum(dim=1)
    seen = (bias >= fraction * mmse).nonzero()
    return int(seen.max()) + 1 if len(seen) else 0


def ring_of(height: int, width: int) -> Tensor:
    """The ring of each frequency of ``torch.fft.rfft2``, shape (H, W // 2 + 1): 0 for f = 0, then from 1 on."""
    frequency = torch.hypot(
        torch.fft.fftfreq(height)[:, None].expand(-1, width // 2 + 1), torch.fft.rfftfreq(width).expand(height, -1)
    )
    rings = (frequency * 2 * RINGS).long().clamp(max=RINGS) + 1
    rings[0, 0] = 0
    return rings


def frequencies_per_ring(height: int, width: int) -> Tensor:
    """How many frequencies of latents of H×W are in each ring, shape (rings,)."""
    counts = torch.zeros(RINGS + 2, dtype=torch.float64)
    return counts.index_add(0, ring_of(height, width).flatten(), _in_whole_spectrum(height, width).flatten())


@functools.lru_cache(maxsize=64)
def _order(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """The places of a half spectrum's frequencies ring by ring, the way back, and how many are in each ring."""
    rings = ring_of(height, width).flatten()
    by_ring = rings.argsort(stable=True)
    sizes = rings.bincount(minlength=RINGS + 2).tolist()
    return by_ring.to(device), by_ring.argsort().to(device), sizes


def _total(covariances: Tensor, counts: Tensor) -> float:
    """The squared error of latents with these covariances of errors in the rings."""
    return float(torch.diagonal(covariances.double(), dim1=1, dim2=2).sum(dim=1) @ counts)


def _in_whole_spectrum(height: int, width: int) -> Tensor:
    """How often each frequency of ``torch.fft.rfft2`` is in the whole spectrum: its other half is left out."""
    times = torch.full((height, width // 2 + 1), 2.0, dtype=torch.float64)
    times[:, 0] = 1
    if width % 2 == 0:
        times[:, -1] = 1
    return times


class _Moments(NamedTuple):
    """C_aa, C_ba and C_bb of each ring, shape (rings, C, C); see the head of this module."""

    before: Tensor
    cross: Tensor
    sharp: Tensor


class _Pair:
    """One reference.

    Args:
        before: its latents with the defect, shape (C, H, W).
        after: those without it.

    Attributes:
        means: of the channels, before and after, shape (2, C).
        counts: frequencies in each ring, shape (rings,).
    """

    def __init__(self, before: Tensor, after: Tensor) -> None:
        height, width = before.shape[-2:]
        self.means = torch.stack([latents.mean(dim=(1, 2)) for latents in (before, after)])
        self.counts = frequencies_per_ring(height, width)
        self._pixels = height * width
        by_ring, _, sizes = _order(height, width, before.device)
        halves = _in_whole_spectrum(height, width).flatten()[by_ring]
        a, b = (torch.fft.rfft2(latents, norm="ortho").flatten(1)[:, by_ring] for latents in (before, after))

        def moment(one: Tensor, other: Tensor) -> Tensor:
            rings = zip((one * halves).split(sizes, dim=1), other.split(sizes, dim=1), strict=True)
            sums = torch.stack([(left @ right.conj().T).real for left, right in rings])
            return sums / self.counts.clamp(min=1)[:, None, None]

        self._moments = _Moments(moment(a, a), moment(b, a), moment(b, b))

    def around(self, means: Tensor) -> _Moments:
        """Its moments when these means, shape (2, C), are taken from f = 0, which is a ring of its own."""
        before, after = self.means - means
        products = torch.outer(before, before), torch.outer(after, before), torch.outer(after, after)
        moments = [moment.clone() for moment in self._moments]
        for moment, product in zip(moments, products, strict=True):
            moment[0] = self._pixels * product  # orthonormal transforms: A(0) is the mean times the root of H·W
        return _Moments(*moments)


def _statistics(pairs: Sequence[_Pair]) -> tuple[Tensor, _Moments]:
    """The means of all references, shape (2, C), and their moments around these."""
    means = torch.stack([pair.means for pair in pairs]).mean(dim=0)
    total = torch.stack([pair.counts for pair in pairs]).sum(dim=0).clamp(min=1)
    shares = [(pair.counts / total)[:, None, None] for pair in pairs]
    each = [pair.around(means) for pair in pairs]
    sums = [sum(share * moment for share, moment in zip(shares, one, strict=True)) for one in zip(*each, strict=True)]
    return means, _Moments(*sums)


def _matrices(moments: _Moments, ridge: float) -> Tensor:
    """M of each ring, shape (rings, C, C)."""
    identity = torch.eye(moments.before.shape[1]).to(moments.before)
    if ridge == math.inf:
        return identity.expand_as(moments.before)
    strength = ridge * torch.diagonal(moments.before, dim1=1, dim2=2).mean(dim=1).clamp(min=1e-12)
    strength[0] *= _RIDGE_OF_MEAN
    added = strength[:, None, None] * identity
    return (moments.cross + added) @ torch.linalg.inv(moments.before + added)


def _error(moments: _Moments, matrices: Tensor) -> Tensor:
    """The covariance of M a - b, shape (rings, C, C)."""
    crossed = matrices @ moments.cross.mT
    return matrices @ moments.before @ matrices.mT - crossed - crossed.mT + moments.sharp
