r"""The arms of the study: what is added to plain MSE, in which pass, and how strongly.

A term is a function of one batch (`Batch`) that returns a scalar. Its gradient with respect to the prediction is scaled
before it goes into the model: by the term's own weight (``share`` None), or so that its norm is ``share`` of that of
the base loss's gradient at the model's output (`freq_loss_plugin.balance`).

With x0_i the clean latent, x0_hat_i = x0_i + k_i·(prediction_i - target_i) its estimate (`freq_loss_plugin.latents`),
and low, high the bands of the loss, the terms are

- ours          L_b = mean(band_b(sum_i x0_hat_i - x0_i)²), 0.7·L_low + 0.3·L_high
- no split      the same without bands: mean((sum_i x0_hat_i - x0_i)²)
- control       mean_i mean((x0_hat_i - x0_i)²): plain MSE, sample by sample, weighted by timestep as ours is
- moments       mean over channels of (difference of means)² + (difference of standard deviations)² of a band over the
                batch; 0.7·low + 0.3·high. Source: the style loss of Huang & Belongie 2017 (arXiv 1703.06868) eq. 13, on
                bands instead of VGG's layers
- spectrum      mean over the rings of a band of (log P_hat_k - log P_k)², P the radial power over the batch; 0.7·low +
                0.3·high. Source: the spectral distance of Durall et al. 2020 (arXiv 2003.01826), logarithmic
- mmd           maximum mean discrepancy between the bands of estimated and clean latents, each picture a sample, with
                the sum of three Gaussian kernels around the median distance; 0.7·low + 0.3·high. Source: Gretton et al.
                2012 (JMLR 13), eq. 5; Li et al. 2015 (arXiv 1502.02761) as a loss
- sham          mean squared coefficients of an orthonormal Haar transform of the residual, all weighted alike: by
                Parseval's theorem plain MSE itself. It takes the place of a part of the base loss
- wavelet-loss, focal    those of PyPI, between prediction and target of the base pass
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from freq_loss_plugin import FreqLossConfig, frequency_decomposition, frequency_matching_loss
from freq_loss_plugin.latents import residual_scale

LOW, HIGH = 0.7, 0.3


@dataclass(frozen=True)
class Batch:
    """What a term may look at.

    Attributes:
        prediction: of the noise, shape (B, C, H, W).
        target: the noise.
        latents: x0.
        timesteps: shape (B,), or one number for all.
        alphas_cumprod: alpha_bar, shape (1000,).
    """

    prediction: Tensor
    target: Tensor
    latents: Tensor
    timesteps: Tensor | float
    alphas_cumprod: Tensor

    def estimate(self) -> Tensor:
        """x0_hat, of the latents' shape."""
        scale = residual_scale("epsilon", self.timesteps, self.alphas_cumprod)
        if isinstance(scale, Tensor):
            scale = scale.view(-1, 1, 1, 1)
        return self.latents + scale * (self.prediction - self.target)


Term = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: for the table.
        term: what is added; None for plain MSE.
        passes: which pass the term is computed from. ``unified`` is one more, at one timestep in the window; ``own``
            and ``shared`` are the base pass itself.
        share: of the base gradient's norm; None: the term as it is.
        replaces: the term takes the place of ``share`` of the base loss, with no other scaling.
        length: optimizer steps, as a multiple of the others'.
    """

    name: str
    term: Term | None = None
    passes: Literal["own", "shared", "unified"] = "unified"
    share: float | None = None
    replaces: bool = False
    length: int = 1


def ours(*, method: str = "wavelet", low: float = LOW, high: float = HIGH, dist_match: float = 1.0) -> Term:
    """The loss of this project, on a batch at one timestep."""
    config = FreqLossConfig.from_mapping(
        {
            "dist_match": dist_match,
            "freq_loss_method": method,
            "freq_loss_low_weight": low,
            "freq_loss_high_weight": high,
        }
    )

    def term(batch: Batch) -> Tensor:
        return frequency_matching_loss(
            batch.prediction,
            batch.target,
            prediction_type="epsilon",
            timesteps=batch.timesteps,
            alphas_cumprod=batch.alphas_cumprod,
            config=config,
        ).total

    return term


def weighted_mse(batch: Batch) -> Tensor:
    """Plain MSE of clean latents."""
    return (batch.estimate() - batch.latents).square().mean()


def moments(batch: Batch) -> Tensor:
    """Means and standard deviations of each channel of each band, over the batch."""

    def distance(estimated: Tensor, clean: Tensor) -> Tensor:
        both = [each.transpose(0, 1).flatten(start_dim=1) for each in (estimated, clean)]
        means = [each.mean(dim=1) for each in both]
        spreads = [(each.var(dim=1, unbiased=False) + 1e-8).sqrt() for each in both]
        return ((means[0] - means[1]).square() + (spreads[0] - spreads[1]).square()).mean()

    return _of_bands(batch, distance)


def spectrum(batch: Batch) -> Tensor:
    """Logarithmic radial power over the batch; a ring belongs to the low band up to 1/8 cycles per latent pixel."""
    (height, width), device = batch.latents.shape[-2:], batch.latents.device
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

    error = (power(batch.estimate()) - power(batch.latents)).square()
    low = torch.arange(1, shortest // 2 + 1, device=device) / shortest <= 1 / 8
    return LOW * error[low].mean() + HIGH * error[~low].mean()


def mmd(batch: Batch) -> Tensor:
    """Kernel distance of the two sets of bands."""

    def distance(estimated: Tensor, clean: Tensor) -> Tensor:
        one, other = estimated.flatten(start_dim=1), clean.flatten(start_dim=1)
        count = len(one)
        both = torch.cat([one, other])
        # Without cdist, whose gradient at distance 0 is not a number.
        squares = (both[:, None] - both[None, :]).square().sum(dim=-1)
        scale = squares.detach()[~torch.eye(2 * count, dtype=torch.bool, device=squares.device)].median()
        kernel = sum((-squares / (factor * scale)).exp() for factor in (0.5, 1.0, 2.0))
        assert isinstance(kernel, Tensor)
        return kernel[:count, :count].mean() + kernel[count:, count:].mean() - 2 * kernel[:count, count:].mean()

    return _of_bands(batch, distance)


def sham(batch: Batch) -> Tensor:
    """Plain MSE, written as a wavelet loss: two levels of an orthonormal Haar transform, all coefficients alike."""
    low, total = batch.prediction - batch.target, torch.zeros((), device=batch.prediction.device)
    for _ in range(2):
        rows = low[..., ::2, :] + low[..., 1::2, :], low[..., ::2, :] - low[..., 1::2, :]
        quarters = [(each[..., ::2] + sign * each[..., 1::2]) / 2 for each in rows for sign in (1, -1)]
        low, *details = quarters
        total = total + sum(each.square().sum() for each in details)
    return (total + low.square().sum()) / batch.prediction.numel()


def _of_bands(batch: Batch, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    estimated, clean = frequency_decomposition(batch.estimate()), frequency_decomposition(batch.latents)
    return LOW * distance(estimated.low, clean.low) + HIGH * distance(estimated.high, clean.high)


def others() -> dict[str, Term]:
    """The losses of other packages at their defaults, where these are installed."""
    found: dict[str, Term] = {}
    with contextlib.suppress(ImportError):
        from freq_loss_plugin import wavelet_library

        wavelet_library.load()  # which wavelet-loss imports
        from wavelet_loss import WaveletLoss

        # Its fade at large timesteps is on the scale of flow models by default; 1000 is that of this one.
        wavelet = WaveletLoss(max_timestep=1000)
        found["wavelet-loss"] = lambda batch: wavelet(batch.prediction, batch.target, batch.timesteps)[0]
    with contextlib.suppress(ImportError):
        from focal_frequency_loss import FocalFrequencyLoss

        focal = FocalFrequencyLoss()
        found["focal"] = lambda batch: focal(batch.prediction, batch.target)
    return found


def all_arms() -> dict[str, Arm]:
    """Every arm, by name, plain MSE first."""
    arms = [
        Arm("plain MSE", passes="own"),
        Arm("plain MSE, twice the steps", passes="own", length=2),
        Arm("sham (MSE as a wavelet loss)", sham, passes="own", share=0.1, replaces=True),
        Arm("control: weighted MSE, 10%", weighted_mse, share=0.1),
        Arm("wavelet, 0.003", ours(dist_match=0.003)),
        Arm("fft, 0.003", ours(method="fft", dist_match=0.003)),
        *(
            Arm(f"{method}, {share:.0%}", ours(method=method), share=share)
            for method in ("wavelet", "fft")
            for share in (0.05, 0.1, 0.2)
        ),
        Arm("no split, 10%", ours(method="fft", low=0.5, high=0.5), share=0.1),
        Arm("wavelet shared, 10%", ours(), passes="shared", share=0.1),
        Arm("moments, 10%", moments, share=0.1),
        Arm("spectrum, 10%", spectrum, share=0.1),
        Arm("mmd, 10%", mmd, share=0.1),
    ]
    for name, term in others().items():
        arms += [Arm(f"{name}, as published", term, passes="own"), Arm(f"{name}, 10%", term, passes="own", share=0.1)]
    return {arm.name: arm for arm in arms}


def gradient_of(term: Term, batch: Batch) -> tuple[Tensor, Tensor]:
    """The value of a term and its gradient with respect to the prediction, neither part of the model's graph."""
    leaf = batch.prediction.detach().requires_grad_()
    value = term(Batch(leaf, batch.target, batch.latents, batch.timesteps, batch.alphas_cumprod))
    (gradient,) = torch.autograd.grad(value, leaf)
    value = value.detach()
    if not math.isfinite(value.item()):
        raise FloatingPointError("a term is not finite")
    return value, gradient
