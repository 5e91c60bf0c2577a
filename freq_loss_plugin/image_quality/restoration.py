r"""Latents of defective images, brought as close to those of sharp images as a linear filter can, and what remains.

A defect does to the latents of one image what it does to those of another, mostly. So it is made on sharp reference
images, both versions are encoded, and one matrix over the channels is fitted for each ring of spatial frequencies. With
A and B the orthonormal 2-D Fourier transforms of latents with and without the defect, their mean over all references
taken from f = 0, and r(f) the ring of f (`RINGS` of equal width up to Nyquist, the corners beyond, and f = 0 alone)

.. math:: C_{ba}(r) = \operatorname{Re} \operatorname{mean}_{f \in r}\big(B A^H\big), \qquad
          M_r = (C_{ba} + \lambda I)(C_{aa} + \lambda I)^{-1}, \qquad
          \hat B(f) = M_{r(f)} A(f)

which is ridge regression towards the identity: where references say little, latents stay as they are. lambda is the
fraction of the mean diagonal of C_aa, out of `RIDGES`, with the least error on references that were left out of the fit
one at a time; the identity is among them. E(r), the covariance of that error, is what remains. Where even that is no
better than leaving the latents alone, as with a single reference, they are left alone, means and all.

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

import torch
from torch import Tensor

RINGS = 16
# Fractions of the mean diagonal; the last one leaves all but the means as it is.
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, math.inf)
# Of f = 0 there is one sample for each reference, and not hundreds.
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
        counts: frequencies in each ring of a reference, shape (rings,).
    """

    matrices: Tensor
    mean_before: Tensor
    mean_after: Tensor
    error: Tensor
    error_before: Tensor
    sharp: Tensor
    ridge: float
    counts: Tensor
    _copies: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

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

        Nothing waits for the device, except when it is used there for the first time.
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
    whole = _Statistics.of(pairs)
    alone = torch.stack([pair.covariance(pair.after - pair.before) for pair in pairs]).mean(dim=0)
    ridge, error = _best_ridge(pairs) if len(pairs) > 1 else (math.inf, alone)
    counts = torch.stack([pair.weights for pair in pairs]).mean(dim=0)
    mean_after = whole.mean_after
    if _total(error, counts) >= _total(alone, counts):
        ridge, error, mean_after = math.inf, alone, whole.mean_before
    tensors = whole.matrices(ridge), whole.mean_before, mean_after, error, alone, whole.sharp
    matrices, mean_before, mean_after, error, alone, covariance = (tensor.float() for tensor in tensors)
    return Restoration(matrices, mean_before, mean_after, error, alone, covariance, ridge, counts)


def _best_ridge(pairs: Sequence[_Pair]) -> tuple[float, Tensor]:
    """The ridge with the least error on references that are left out one at a time, and the covariance of that error.

    Args:
        pairs: two or more.
    """
    remaining = dict.fromkeys(RIDGES, torch.zeros(()))
    for number, pair in enumerate(pairs):
        others = _Statistics.of([*pairs[:number], *pairs[number + 1 :]])
        for ridge in RIDGES:
            remaining[ridge] = remaining[ridge] + pair.error(others, others.matrices(ridge)) / len(pairs)
    counts = torch.stack([pair.weights for pair in pairs]).mean(dim=0)
    best = min(RIDGES, key=lambda ridge: _total(remaining[ridge], counts))
    return best, remaining[best]


def least_timestep(error: Tensor, sharp: Tensor, snr: Tensor, fraction: float, counts: Tensor | None = None) -> int:
    """The first timestep from which on bias / mmse stays below ``fraction``; see the head of this module.

    Args:
        error: E, shape (rings, C, C).
        sharp: S, of the same shape.
        snr: see `freq_loss_plugin.image_quality.detectability.signal_to_noise`, shape (1000,).
        fraction: above 0.
        counts: frequencies in each ring, shape (rings,); those of latents of 64×64 where left out.
    """
    counts = frequencies_per_ring(64, 64) if counts is None else counts
    values, vectors = torch.linalg.eigh(sharp.double())
    values = values.clamp(min=1e-8)
    in_them = torch.einsum("rji,rjk,rkl->ril", vectors, error.double(), vectors)
    variance = torch.diagonal(in_them, dim1=1, dim2=2).clamp(min=0)
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


class _Pair:
    """The spectra of one reference, shape (C, H, W // 2 + 1): before is with the defect, after without it."""

    def __init__(self, before: Tensor, after: Tensor) -> None:
        self.before, self.after = (torch.fft.rfft2(latents, norm="ortho") for latents in (before, after))
        self._pixels = before.shape[-2] * before.shape[-1]
        self._rings = ring_of(*before.shape[-2:])
        self._halves = _in_whole_spectrum(*before.shape[-2:])
        self.weights = frequencies_per_ring(*before.shape[-2:])
        self.means = [latents.mean(dim=(1, 2)) for latents in (before, after)]

    def centered(self, statistics: _Statistics) -> tuple[Tensor, Tensor]:
        """Both spectra without the means over references."""
        result = []
        for spectrum, mean in ((self.before, statistics.mean_before), (self.after, statistics.mean_after)):
            spectrum = spectrum.clone()
            spectrum[:, 0, 0] -= mean * self._pixels**0.5
            result.append(spectrum)
        return result[0], result[1]

    def covariance(self, one: Tensor, other: Tensor | None = None) -> Tensor:
        """Re mean of one·other^H in each ring, shape (rings, C, C)."""
        other = one if other is None else other
        weighted = (one * self._halves).flatten(1)
        sums = []
        rings = self._rings.flatten()
        for ring in range(RINGS + 2):
            inside = rings == ring
            sums.append((weighted[:, inside] @ other.flatten(1)[:, inside].conj().T).real)
        return torch.stack(sums) / self.weights.clamp(min=1)[:, None, None]

    def error(self, statistics: _Statistics, matrices: Tensor) -> Tensor:
        """What remains of the defect in each ring after restoring with a fit to other references."""
        before, after = self.centered(statistics)
        restored = torch.einsum("hwij,jhw->ihw", matrices.to(before)[self._rings], before)
        return self.covariance(restored - after)


@dataclass(frozen=True)
class _Statistics:
    """Means and covariances of references; see the head of this module."""

    mean_before: Tensor
    mean_after: Tensor
    before: Tensor
    cross: Tensor
    sharp: Tensor

    @classmethod
    def of(cls, pairs: Sequence[_Pair]) -> _Statistics:
        means = [torch.stack([pair.means[which] for pair in pairs]).mean(dim=0) for which in range(2)]
        empty = torch.zeros(())
        centered = cls(means[0], means[1], empty, empty, empty)
        spectra = [pair.centered(centered) for pair in pairs]
        total = torch.stack([pair.weights for pair in pairs]).sum(dim=0).clamp(min=1)

        def mean(which: tuple[int, int]) -> Tensor:
            found = [
                pair.covariance(both[which[0]], both[which[1]]) * pair.weights[:, None, None]
                for pair, both in zip(pairs, spectra, strict=True)
            ]
            return torch.stack(found).sum(dim=0) / total[:, None, None]

        return cls(means[0], means[1], mean((0, 0)), mean((1, 0)), mean((1, 1)))

    def matrices(self, ridge: float) -> Tensor:
        """M of each ring, shape (rings, C, C)."""
        identity = torch.eye(self.before.shape[1], dtype=self.before.dtype)
        if ridge == math.inf:
            return identity.expand_as(self.before)
        strength = ridge * torch.diagonal(self.before, dim1=1, dim2=2).mean(dim=1).clamp(min=1e-12)
        strength[0] *= _RIDGE_OF_MEAN
        added = strength[:, None, None] * identity
        return (self.cross + added) @ torch.linalg.inv(self.before + added)
