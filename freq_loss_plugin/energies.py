r"""The folded loss step by step: D = sum_i c_i·m_i·(prediction_i - target_i), its band energies, and their gradient.

Both steps have their gradient written out, since autograd would keep and walk through a dozen intermediates for it. For
the wavelet bands, with P D = A_H · D · A_W^T (see `freq_loss_plugin.bands`):

    D                                        two products of a (C·H·W, B) matrix with c, no residual in memory
    L_low = mean (P D)²,  L_high = mean (D - P D)²
    dtotal/dD = 2/n · ( w_high·high + P^T (w_low·low - w_high·high) ),   high = D - P D,  n = C·H·W
    dtotal/dprediction_i = c_i·m_i · dtotal/dD

A_n has a rank r of about n/2^J, so it is kept as up·down with orthonormal columns in ``up``: the products shrink by
2^J, and L_low is read off the r×r middle. For the FFT bands P is a projection: the gradient is one inverse FFT.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, autocast

from .bands import (
    LARGEST_OPERATOR,
    LowPassFactors,
    fft_weights,
    low_pass_factors,
    wavelet_low_band,
)
from .config import FreqLossConfig


def batch_difference(prediction: Tensor, target: Tensor, coefficients: Tensor, mask: Tensor | None) -> Tensor:
    r"""D, shape (C, H, W) or (C, T, H, W), in the dtype of ``coefficients``.

    .. math:: D = \sum_i c_i \, m_i \, (prediction_i - target_i)

    Args:
        prediction: shape (B, C, H, W) or (B, C, T, H, W).
        target: the same shape.
        coefficients: c, shape (B,), float32 or float64.
        mask: m, broadcastable to ``prediction``, or None.
    """
    return cast(Tensor, _BatchDifference.apply(prediction, target, coefficients, mask))


def band_energies(difference: Tensor, config: FreqLossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(total, L_low, L_high) of D, scalars; the gradient goes through ``total`` alone.

    ``total`` is ``dist_match·(low_weight·L_low + high_weight·L_high)``.
    """
    weights = config.dist_match * config.low_weight, config.dist_match * config.high_weight
    if config.resolved_method == "fft":
        total, energies = _FftEnergies.apply(difference, *weights, config.cutoff)
    elif max(difference.shape[-2:]) <= LARGEST_OPERATOR:
        total, energies = _WaveletEnergies.apply(difference, *weights, config.wavelet, config.levels)
    else:
        low = wavelet_low_band(difference, config.wavelet, config.levels)
        energies = torch.stack([low.square().mean(), (difference - low).square().mean()])
        total, energies = _weigh(energies, weights), energies.detach()
    return (total, *energies.unbind())


class _BatchDifference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor, coefficients: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(coefficients, mask)
        ctx.like = prediction.shape, prediction.dtype, target.dtype
        if mask is None and prediction.dtype == target.dtype == coefficients.dtype:
            difference = torch.mv(_columns(prediction), coefficients)
            difference.addmv_(_columns(target), coefficients, alpha=-1)
        else:
            residual = _residual(prediction, target, coefficients.dtype)
            difference = torch.mv(_columns(residual if mask is None else residual.mul_(mask)), coefficients)
        return difference.view(prediction.shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, mask = ctx.saved_tensors
        shape, *dtypes = ctx.like
        # Not `outer` nor any other product of matrices, which an autocast around the backward pass would round.
        each = (coefficients[:, None] * gradient.reshape(1, -1)).view(shape)
        if mask is not None:
            each = each.mul_(mask)
        of_prediction = each.to(dtypes[0]) if ctx.needs_input_grad[0] else None
        of_target = -each.to(dtypes[1]) if ctx.needs_input_grad[1] else None
        return of_prediction, of_target, None, None


class _WaveletEnergies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, difference: Tensor, low_weight: float, high_weight: float, wavelet: str, levels: int
    ) -> tuple[Tensor, Tensor]:
        height, width = difference.shape[-2:]
        rows = low_pass_factors(height, wavelet, levels, difference.device, difference.dtype)
        columns = low_pass_factors(width, wavelet, levels, difference.device, difference.dtype)
        frames = difference.reshape(-1, height, width)
        middle = torch.bmm(_each(rows.down, frames), frames) @ columns.down.T
        high = torch.baddbmm(frames, torch.bmm(_each(rows.up, frames), middle), _each(columns.up.T, frames), alpha=-1)
        energies = torch.stack([_product(middle, middle), _product(high, high)]) / frames.numel()
        ctx.save_for_backward(middle, high)
        ctx.rows, ctx.columns, ctx.weights, ctx.shape = rows, columns, (low_weight, high_weight), difference.shape
        ctx.mark_non_differentiable(energies)
        return _weigh(energies, ctx.weights), energies

    @staticmethod
    def backward(ctx: Any, of_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        middle, high = ctx.saved_tensors
        with autocast(high.device.type, enabled=False):
            gradient = _wavelet_gradient(middle, high, ctx.rows, ctx.columns, ctx.weights)
            return gradient.mul_(of_total).view(ctx.shape), None, None, None, None


def _wavelet_gradient(
    middle: Tensor, high: Tensor, rows: LowPassFactors, columns: LowPassFactors, weights: tuple[float, float]
) -> Tensor:
    low_weight, high_weight = weights
    # up^T·(w_low·low - w_high·high)·up, in which up^T·low·up is the middle.
    inner = torch.baddbmm(
        middle, torch.bmm(_each(rows.up.T, high), high), _each(columns.up, high), beta=low_weight, alpha=-high_weight
    )
    scale = 2 / high.numel()
    outer = _each(columns.down, high)
    return torch.baddbmm(high, torch.bmm(_each(rows.down.T, high), inner), outer, beta=scale * high_weight, alpha=scale)


def _each(matrix: Tensor, frames: Tensor) -> Tensor:
    """One matrix for all frames of a batch product."""
    return matrix.expand(len(frames), -1, -1)


class _FftEnergies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, difference: Tensor, low_weight: float, high_weight: float, cutoff: float
    ) -> tuple[Tensor, Tensor]:
        height, width = difference.shape[-2:]
        like = height, width, cutoff, difference.device, difference.dtype
        spectrum = torch.fft.rfft2(difference)
        # |F|² summed over channels (and frames), per pixel of the latent because L_b is a mean.
        power = torch.view_as_real(spectrum).square().sum(dim=-1).flatten(end_dim=-3).sum(dim=0)
        weights = fft_weights(*like)
        energies = torch.stack([_product(power, weights.low), _product(power, weights.high)]) / difference.numel()
        ctx.save_for_backward(spectrum)
        ctx.like, ctx.weights, ctx.shape = like, (low_weight, high_weight), difference.shape
        ctx.mark_non_differentiable(energies)
        return _weigh(energies, ctx.weights), energies

    @staticmethod
    def backward(ctx: Any, of_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (spectrum,), (low_weight, high_weight) = ctx.saved_tensors, ctx.weights
        # Both bands are projections, so the gradient of a band's energy is twice that band.
        gains = high_weight + (low_weight - high_weight) * fft_weights(*ctx.like).disc
        gradient = torch.fft.irfft2(spectrum * gains, s=ctx.shape[-2:])
        return gradient.mul_(2 / gradient.numel() * of_total), None, None, None


def _residual(prediction: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor; half precision is converted before it is subtracted, which rounds."""
    if dtype in (prediction.dtype, target.dtype):
        return prediction - target  # the wider type wins
    return prediction.to(dtype).sub_(target)


def _columns(batch: Tensor) -> Tensor:
    """(B, …) as a matrix with one column for each sample."""
    return batch.reshape(batch.shape[0], -1).T


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a·b."""
    return torch.dot(a.reshape(-1), b.reshape(-1))


def _weigh(energies: Tensor, weights: tuple[float, float]) -> Tensor:
    """Of (L_low, L_high): the sum, weighted."""
    return torch.add(weights[0] * energies[0], energies[1], alpha=weights[1])
