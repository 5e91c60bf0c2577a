"""The loss's bands on validation images: how far predicted clean latents are from the clean ones.

L_low and L_high are those of the loss, for each validation batch as if it were a training batch, and averaged. The
log-spectral distance (`freq_loss_plugin.analysis.spectra`) is between the set of all predicted and that of all clean
latents: 0 where detail is as strong as it should be, above it where it is too weak (blur) or too strong. Only passes at
timesteps in the window of the loss count: outside it, an estimate of the clean latent says little of an image's detail,
or of the model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..analysis.figures import spectrum_plot
from ..analysis.spectra import SpectrumComparison, compare_spectra
from ..loss.energies import band_energies
from ..loss.sample_weights import in_window
from ..options.config import FreqLossConfig

PREFIX = "loss/validation/freq_"


class ValidationResult(NamedTuple):
    """Numbers by name, and both spectra (A: predicted, B: clean) of the size that most images have."""

    numbers: dict[str, float]
    spectra: SpectrumComparison

    def logs(self) -> dict[str, float]:
        """As TensorBoard and W&B show them."""
        return {f"{PREFIX}{name}": value for name, value in self.numbers.items()}

    def plot(self) -> Tensor:
        """Both spectra; shape (H, W, 3), 0..1.

        Raises:
            ImportError: matplotlib is missing.
        """
        return spectrum_plot(self.spectra, "A: predicted clean latents, B: clean latents")


class ValidationBands:
    """Collects the passes of one validation.

    Args:
        config: its bands, window and ``reduction`` are used.
    """

    def __init__(self, config: FreqLossConfig) -> None:
        self._config = config
        self._energies: list[tuple[float, float]] = []
        self._latents: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}

    @torch.no_grad()
    def add(self, clean: Tensor, residual: Tensor, scale: Tensor | float, timesteps: Tensor | float) -> None:
        """Take one pass.

        Args:
            clean: x0, shape (B, C, H, W) or (B, C, T, H, W).
            residual: prediction - target, of the same shape.
            scale: k, see `freq_loss_plugin.loss.latents.residual_scale`; shape (B,) or a number.
            timesteps: on the 0..1000 scale, shape (B,) or a number.
        """
        count = len(clean)
        at = torch.as_tensor(timesteps, dtype=torch.float32).flatten().cpu().expand(count)
        chosen = in_window(at, (self._config.min_timestep, self._config.max_timestep))
        if not chosen.any():
            return
        kept = clean.float().cpu()[chosen]
        k = torch.as_tensor(scale, dtype=torch.float32).flatten().cpu().expand(count)[chosen]
        errors = k.view(-1, *([1] * (clean.ndim - 1))) * residual.float().cpu()[chosen]
        difference = errors.mean(dim=0) if self._config.reduction == "mean" else errors.sum(dim=0)
        _, low, high = band_energies(difference, self._config.loss_spec)
        self._energies.append((low.item(), high.item()))
        self._latents.setdefault(tuple(clean.shape[1:]), []).append((kept + errors, kept))

    def clear(self) -> None:
        """Forget what was added."""
        self._energies, self._latents = [], {}

    def finish(self) -> ValidationResult | None:
        """The result of what was added since the last call; None where no pass was inside the window."""
        energies, latents = self._energies, self._latents
        self.clear()
        if not energies:
            return None
        low, high = (sum(values) / len(values) for values in zip(*energies, strict=True))
        compared = []
        for pairs in latents.values():
            predicted, clean = (torch.cat(each) for each in zip(*pairs, strict=True))
            compared.append((len(clean), compare_spectra(predicted, clean, self._config.bands)))
        total = sum(count for count, _ in compared)
        distances = [sum(count * each.bands[band].distance for count, each in compared) / total for band in range(2)]
        numbers = {"low": low, "high": high, "spectrum_low": distances[0], "spectrum_high": distances[1]}
        return ValidationResult(numbers, max(compared, key=lambda each: each[0])[1])
