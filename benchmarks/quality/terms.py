r"""Other statistics in place of the batch sum: the terms of the study that are no part of the loss.

A statistic is a function of one pass and the clean latents of its batch, and returns a scalar. With x0_i the clean
latent, x0_hat_i = x0_i + k_i·(prediction_i - target_i) its estimate (`freq_loss_plugin.loss.latents`), and low, high
the bands of the loss:

- weighted_mse  mean_i mean((x0_hat_i - x0_i)²): plain MSE per sample, weighted by timestep as the loss is
- moments       mean over channels of (difference of means)² + (difference of standard deviations)² of a band over the
                batch; 0.7·low + 0.3·high. Source: the style loss of Huang & Belongie 2017 (arXiv 1703.06868) eq. 13, on
                bands instead of VGG's layers
- spectrum      mean over the rings of a band of (log P_hat_k - log P_k)², P the radial power over the batch; 0.7·low +
                0.3·high. Source: the spectral distance of Durall et al. 2020 (arXiv 2003.01826), logarithmic
- mmd           maximum mean discrepancy between the bands of estimated and clean latents, each image a sample, with
                the sum of three Gaussian kernels around the median distance; 0.7·low + 0.3·high. Source: Gretton et al.
                2012 (JMLR 13), eq. 5; Li et al. 2015 (arXiv 1502.02761) as a loss
- wavelet-loss, focal    those of PyPI, between prediction and target
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from freq_loss_plugin import FreqLossConfig, frequency_decomposition
from freq_loss_plugin.loss.latents import residual_scale
from freq_loss_plugin.training.gradient_balance import GradientRatio, base_gradient, with_gradient
from freq_loss_plugin.training.passes import Pass, Plan
from freq_loss_plugin.training.term import FrequencyTerm
from freq_loss_plugin.training.timesteps import Draws

LOW, HIGH = 0.7, 0.3

Statistic: TypeAlias = Callable[[Pass, Tensor], Tensor]


class StatisticTerm:
    """A statistic in place of the frequency term, with the calls of `FrequencyTerm`.

    The ratio of the gradients follows the base loss of the same batch, so the graph of an extra pass lives until the
    base pass has run.

    Args:
        config: its timesteps and ``gradient_ratio`` are used; without the ratio the statistic is added as it is.
        statistic: what is added.
        clean: returns x0 of the current batch, shape (B, C, H, W).
        seed: of the run.
    """

    def __init__(
        self, config: FreqLossConfig, statistic: Statistic, clean: Callable[[], Tensor], *, seed: int | None
    ) -> None:
        self._timesteps = FrequencyTerm(config, "epsilon", seed=seed)
        self._ratio = GradientRatio(config.gradient_ratio) if config.gradient_ratio else None
        self._statistic, self._clean = statistic, clean
        self._extra: Pass | None = None
        self._value = torch.zeros(())

    def plan(self) -> Plan:
        """As `FrequencyTerm.plan`."""
        return self._timesteps.plan()

    def choose(self, draws: Draws) -> Tensor:
        """As `FrequencyTerm.choose`."""
        return self._timesteps.choose(draws)

    @property
    def has_term(self) -> bool:
        """As `FrequencyTerm.has_term`."""
        return self._timesteps.has_term

    def extra_pass(self, passed: Pass, _backward: Callable[[Tensor], None]) -> None:
        """Keep the extra pass for `join`, whose loss goes back through both passes."""
        self._extra = passed

    def join(self, passed: Pass, base_loss: Tensor) -> Tensor:
        """The base loss plus the statistic, of the extra pass where there was one."""
        used, self._extra = self._extra or passed, None
        value, gradient = statistic_with_gradient(self._statistic, used, self._clean())
        if self._ratio is not None:
            self._ratio.observe(gradient.device, base=base_gradient(base_loss, passed.prediction), term=gradient)
            gain = self._ratio.gain(gradient.device)
            value, gradient = gain * value, gain * gradient
        self._value = value
        return base_loss + with_gradient(used.prediction, value, gradient)

    def settle(self, step: int) -> None:
        """Check the statistic of the last batch before the optimizer runs.

        Raises:
            FloatingPointError: it is NaN or infinite.
        """
        if not self._value.isfinite():
            raise FloatingPointError(f"the statistic is not finite in step {step}")


def statistic_with_gradient(statistic: Statistic, passed: Pass, clean: Tensor) -> tuple[Tensor, Tensor]:
    """The value of a statistic and its gradient with respect to the prediction, neither part of the model's graph."""
    prediction = passed.prediction.detach().requires_grad_()
    value = statistic(passed._replace(prediction=prediction), clean)
    (gradient,) = torch.autograd.grad(value, prediction)
    return value.detach(), gradient


def estimate(passed: Pass, clean: Tensor) -> Tensor:
    """x0_hat, shape as ``clean``."""
    scale = residual_scale("epsilon", passed.timesteps, passed.alphas_cumprod)
    if isinstance(scale, Tensor):
        scale = scale.view(-1, 1, 1, 1)
    return clean + scale * (passed.prediction - passed.target)


def weighted_mse(passed: Pass, clean: Tensor) -> Tensor:
    """Plain MSE of clean latents."""
    return (estimate(passed, clean) - clean).square().mean()


def moments(passed: Pass, clean: Tensor) -> Tensor:
    """Means and standard deviations of each channel of each band, over the batch."""

    def distance(estimated: Tensor, exact: Tensor) -> Tensor:
        both = [band.transpose(0, 1).flatten(start_dim=1) for band in (estimated, exact)]
        means = [channels.mean(dim=1) for channels in both]
        deviations = [(channels.var(dim=1, unbiased=False) + 1e-8).sqrt() for channels in both]
        return ((means[0] - means[1]).square() + (deviations[0] - deviations[1]).square()).mean()

    return _over_bands(passed, clean, distance)


def spectrum(passed: Pass, clean: Tensor) -> Tensor:
    """Logarithmic radial power over the batch; a ring belongs to the low band up to 1/8 cycles per latent pixel."""
    (height, width), device = clean.shape[-2:], clean.device
    rows = torch.fft.fftfreq(height, device=device)[:, None]
    radius = torch.hypot(rows, torch.fft.rfftfreq(width, device=device)[None, :])
    shortest = min(height, width)
    rings = (radius * shortest + 0.5).long().flatten()
    inside = (rings > 0) & (rings <= shortest // 2)  # neither the mean nor the corners
    sizes = torch.bincount(rings[inside], minlength=shortest // 2 + 1)[1:]

    def power(latents: Tensor) -> Tensor:
        energy = torch.fft.rfft2(latents).abs().square().mean(dim=(0, 1)).flatten()
        sums = energy.new_zeros(shortest // 2 + 1).index_add(0, rings[inside], energy[inside])[1:]
        return (sums / sizes + 1e-6).log()

    error = (power(estimate(passed, clean)) - power(clean)).square()
    low = torch.arange(1, shortest // 2 + 1, device=device) / shortest <= 1 / 8
    return LOW * error[low].mean() + HIGH * error[~low].mean()


def mmd(passed: Pass, clean: Tensor) -> Tensor:
    """Kernel distance between the two sets of bands."""

    def distance(estimated: Tensor, exact: Tensor) -> Tensor:
        count, both = len(exact), torch.cat([estimated, exact]).flatten(start_dim=1)
        # Without cdist, whose gradient is NaN at distance 0.
        squares = (both[:, None] - both[None, :]).square().sum(dim=-1)
        scale = squares.detach()[~torch.eye(2 * count, dtype=torch.bool, device=squares.device)].median()
        kernel = torch.stack([(-squares / (factor * scale)).exp() for factor in (0.5, 1.0, 2.0)]).sum(dim=0)
        return kernel[:count, :count].mean() + kernel[count:, count:].mean() - 2 * kernel[:count, count:].mean()

    return _over_bands(passed, clean, distance)


def _over_bands(passed: Pass, clean: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    estimated, exact = frequency_decomposition(estimate(passed, clean)), frequency_decomposition(clean)
    return LOW * distance(estimated.low, exact.low) + HIGH * distance(estimated.high, exact.high)


def published() -> dict[str, Statistic]:
    """The losses of other packages at their defaults, where these are installed."""
    losses: dict[str, Statistic] = {}
    with contextlib.suppress(ImportError):
        from freq_loss_plugin.loss import wavelet_library

        wavelet_library.load()  # which wavelet-loss imports
        from wavelet_loss import WaveletLoss

        # By default it fades out at large timesteps on the 0..1 scale of flow models; here timesteps go up to 1000.
        wavelet = WaveletLoss(max_timestep=1000)
        losses["wavelet-loss"] = lambda passed, _: wavelet(passed.prediction, passed.target, passed.timesteps)[0]
    with contextlib.suppress(ImportError):
        from focal_frequency_loss import FocalFrequencyLoss

        focal = FocalFrequencyLoss()
        losses["focal"] = lambda passed, _: focal(passed.prediction, passed.target)
    return losses
