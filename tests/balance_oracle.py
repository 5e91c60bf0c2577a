"""`freq_loss_balance`, computed sample by sample and bin by bin in NumPy."""

from __future__ import annotations

import numpy as np
import oracle

BINS = 20


class Expected:
    """The running means and weights, sample by sample and bin by bin."""

    def __init__(self, mode, power=0.5):
        self.mode, self.power = mode, power
        self.means, self.counts = {}, np.zeros(BINS)

    def bands(self, residual):
        return [residual] if self.mode == "timestep" else list(oracle.wavelet_bands(residual))

    def observe(self, residual, timesteps, mask=None):
        for band, values in enumerate(self.bands(residual)):
            in_bins = {}
            for i, t in enumerate(timesteps):
                weights = np.ones_like(values[i]) if mask is None else np.broadcast_to(mask[i], values[i].shape)
                in_bins.setdefault(int(t // 50), []).append((weights * values[i] ** 2).sum() / weights.sum())
            for number, losses in in_bins.items():
                old = self.means.get((band, number))
                new = np.mean(losses)
                self.means[band, number] = new if old is None else 0.8 * old + 0.2 * new
        for t in timesteps:
            self.counts[int(t // 50)] += 1

    def weights(self):
        bands = 1 if self.mode == "timestep" else 2
        weights = np.zeros((bands, BINS))
        for band in range(bands):
            for number in range(BINS):
                near = [(0.25 ** abs(number - other), value) for (b, other), value in self.means.items() if b == band]
                mean = sum(n * np.log(value) for n, value in near) / sum(n for n, _ in near)
                weights[band, number] = np.exp(-self.power * mean)
        before = sum(self.counts[number] * value for (_, number), value in self.means.items())
        after = sum(self.counts[number] * value * weights[band, number] for (band, number), value in self.means.items())
        return weights * before / after

    def loss(self, residual, timesteps):
        """The weighed base loss of one process's samples: the mean square of the filtered residual."""
        bins = [int(t // 50) for t in timesteps]
        weights = self.weights()[:, bins].reshape(-1, len(bins), *[1] * (residual.ndim - 1))
        return np.square(sum(np.sqrt(weights) * self.bands(residual))).mean()
