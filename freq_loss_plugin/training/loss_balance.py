r"""The base loss, balanced over noise levels and bands: a sample weighs less where losses are large anyway.

With r_i = prediction_i - target_i, k_i the timestep bin of sample i (`BINS` of equal width), and the bands b of the
mode (``timestep``: one, r itself; ``band``: low and high)

.. math:: w_b(k) = c \, S_b(k)^{-p}, \qquad
          loss_i = \sum_b w_b(k_i) \operatorname{mean}\big(band_b(r_i)^2\big)

- L_b(k) is the running mean of mean(band_b(r)²) over the samples in bin k (`KEPT` of the old value; a batch counts with
  the mean of its samples in the bin). With a mask m it is sum(m·band_b(r)²) / sum(m).
- S_b(k) is its geometric mean over neighboring bins, which count less by `NEIGHBOR` for each bin of distance. A bin
  that no sample has visited takes the value of those nearby, so every weight is defined from the first batch on. That
  batch is already part of the running means, and so no first sample of a bin has a spike.
- c keeps the mean loss where it was: with n(k) samples seen in bin k,
  sum_k n(k) sum_b w_b(k) L_b(k) = sum_k n(k) sum_b L_b(k). Learning rates and gradient clipping keep their meaning.

In the mode ``timestep`` the weights multiply the loss of each sample. In the mode ``band`` the residual is filtered
before the trainer takes its loss, r' = sum_b sqrt(w_b)·band_b(r), whose square has these weights where the bands are
orthogonal (those of the FFT, nearly those of the default wavelet); masks, Huber losses and sample weights keep working.

Source: measurements of this project; the idea of weights from the loss itself at each noise level is that of EDM2
(Karras et al. 2024, arXiv 2312.02696), which learns them.

Everything stays on the device. Processes sum what they saw, so that they agree on the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, autocast

from ..analysis.figures import weights_plot
from ..loss.latents import NUM_TRAIN_TIMESTEPS
from ..options.config import FreqLossConfig
from .distributed import there_are_several
from .monitor import DeferredScalars
from .passes import Pass

BINS = 20
KEPT = 0.8
NEIGHBOR = 0.25
_SMALLEST = 1e-12
# Batches from one plot of the weights to the next.
PLOT_BATCHES = 100


class Balanced(NamedTuple):
    """What the base loss is made of.

    Attributes:
        prediction: replaces the model's, and carries its gradient; in float32 where it is filtered.
        weights: multiply the losses of the samples, shape (B,); None where the prediction has them already.
    """

    prediction: Tensor
    weights: Tensor | None = None


class LossBalance:
    """Finds the weights of a run's base loss, batch by batch.

    Args:
        config: its ``balance``, ``balance_power`` and bands are used.
    """

    def __init__(self, config: FreqLossConfig) -> None:
        self._config = config
        # Per band and bin; and the samples seen per bin. On the device of the first batch from then on.
        self._means = torch.zeros(2 if config.balance == "band" else 1, BINS)
        self._counts = torch.zeros(BINS)
        self._batches = 0
        self._arriving: DeferredScalars | None = None

    def balance(self, passed: Pass) -> Balanced:
        """Take the samples of a base pass into the running means, and weigh them; in all processes together.

        Args:
            passed: the base pass; its timesteps are on the scale 0..1000, one for each sample.
        """
        dtype = torch.promote_types(passed.prediction.dtype, torch.float32)
        target = passed.target.to(dtype)
        residual = passed.prediction.to(dtype) - target
        with autocast(residual.device.type, enabled=False):
            bands = self._split(residual)
            bins = self._bins(passed.timesteps, residual)
            self._observe([band.detach() for band in bands], bins, passed.mask)
            table = self.weights()
            if self._batches % PLOT_BATCHES == 0:
                self._arriving = DeferredScalars(*table.flatten())
            self._batches += 1
            weights = table[:, None, :].mul(bins).sum(dim=2)
            if self._config.balance == "timestep":
                return Balanced(passed.prediction, weights[0])
            roots = weights.sqrt().reshape(len(bands), -1, *[1] * (residual.ndim - 1))
            filtered = sum(root * band for root, band in zip(roots, bands, strict=True))
            return Balanced(target + filtered)

    def weights(self) -> Tensor:
        """w_b(k), shape (bands, BINS); 1 before the first batch."""
        means, counts = self._means, self._counts
        bins = torch.arange(BINS, device=means.device)
        nearness = NEIGHBOR ** (bins[:, None] - bins).abs() * (counts > 0)
        logs = means.clamp(min=_SMALLEST).log() @ nearness.T / nearness.sum(dim=1).clamp(min=_SMALLEST)
        weights = torch.exp(-self._config.balance_power * logs)
        scale = (counts * means).sum() / (counts * weights * means).sum()
        return torch.where(counts.sum() > 0, scale * weights, torch.ones_like(weights))

    def plot(self) -> Tensor | None:
        """The weights over timestep and band as an image of shape (H, W, 3), 0..1, once in `PLOT_BATCHES` batches.

        Raises:
            ImportError: matplotlib is missing.
        """
        if self._arriving is None:
            return None
        values, self._arriving = torch.tensor(self._arriving.read()), None
        names = ("low band", "high band") if self._config.balance == "band" else ("all bands",)
        return weights_plot(dict(zip(names, values.view(len(names), BINS), strict=True)), NUM_TRAIN_TIMESTEPS)

    def state_dict(self) -> dict[str, Tensor]:
        """Running means and counts, on the CPU."""
        return {"means": self._means.to("cpu", copy=True), "counts": self._counts.to("cpu", copy=True)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> bool:
        """Go on with what `state_dict` returned; False where it is that of the other mode."""
        if any(name not in state for name in ("means", "counts")) or state["means"].shape != self._means.shape:
            return False
        self._means, self._counts = state["means"].clone(), state["counts"].clone()
        return True

    def _split(self, residual: Tensor) -> tuple[Tensor, ...]:
        return (residual,) if self._config.balance == "timestep" else tuple(self._config.bands.split(residual))

    @staticmethod
    def _bins(timesteps: Tensor | float, like: Tensor) -> Tensor:
        """Each sample's bin as a row of one 1, shape (B, BINS)."""
        at = torch.as_tensor(timesteps, dtype=torch.float32, device=like.device).expand(len(like))
        numbers = (at * (BINS / NUM_TRAIN_TIMESTEPS)).long().clamp(0, BINS - 1)
        return (numbers[:, None] == torch.arange(BINS, device=like.device)).to(torch.float32)

    def _observe(self, bands: list[Tensor], bins: Tensor, mask: Tensor | None) -> None:
        squares = torch.stack([_mean_square(band, mask) for band in bands]).float()
        usable = squares.isfinite().all(dim=0)
        bins = bins * usable[:, None]
        sums = torch.cat([torch.where(usable, squares, 0.0) @ bins, bins.sum(dim=0, keepdim=True)])
        if there_are_several():
            dist.all_reduce(sums)
        means, counts = self._means.to(sums.device), self._counts.to(sums.device)
        new = sums[:-1] / sums[-1].clamp(min=1)
        moved = torch.where(counts > 0, KEPT * means + (1 - KEPT) * new, new)
        self._means = torch.where(sums[-1] > 0, moved, means)
        self._counts = counts + sums[-1]


def _mean_square(band: Tensor, mask: Tensor | None) -> Tensor:
    """mean(band²) of each sample, shape (B,); NaN where a mask leaves nothing."""
    squares = band.square()
    if mask is None:
        return squares.flatten(start_dim=1).mean(dim=1)
    mask = mask.to(squares).expand_as(squares)
    return (mask * squares).flatten(start_dim=1).sum(dim=1) / mask.flatten(start_dim=1).sum(dim=1)
