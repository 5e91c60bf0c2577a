r"""The folded loss step by step: D = sum_i c_i·m_i·(prediction_i - target_i), its band energies, and their gradient.

Both steps have their gradient written out, since autograd would keep and walk through a dozen intermediates for it. For
the wavelet bands, with P D = A_H · D · A_W^T (see `freq_loss_plugin.loss.bands`):

    D                                        two products of a (C·H·W, B) matrix with c, no residual in memory
    L_low = mean (P D)²,  L_high = mean (D - P D)²
    dtotal/dD = 2/n · ( w_high·high + P^T (w_low·low - w_high·high) ),   high = D - P D,  n = C·H·W
    dtotal/dprediction_i = c_i·m_i · dtotal/dD

A_n has a rank r of about n/2^J, so it is kept as up·down with orthonormal columns in ``up``: the products shrink by
2^J, and L_low is read off the r×r middle.

For the FFT bands P is a projection: the gradient is one inverse FFT.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, autocast
from torch.autograd.function import once_differentiable

from .bands import LARGEST_OPERATOR, wavelet_low_band
from .operators import LowPassFactors, fft_weights, low_pass_factors, operator
from .params import LossSpec


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


def band_energies(difference: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(total, L_low, L_high) of D, scalars; the gradient goes through ``total`` alone.

    ``total`` is ``dist_match·(low_weight·L_low + high_weight·L_high)``.

    Args:
        difference: D, shape (C, H, W) or (C, T, H, W).
        spec: the bands and the weights.
    """
    bands, weights = spec.bands, (spec.dist_match * spec.low_weight, spec.dist_match * spec.high_weight)
    if bands.resolved_method == "fft":
        total, energies = _FftEnergies.apply(difference, *weights, bands.cutoff)
    elif max(difference.shape[-2:]) <= LARGEST_OPERATOR:
        total, energies = _WaveletEnergies.apply(difference, *weights, bands.wavelet, bands.levels)
    else:
        low = wavelet_low_band(difference, bands.wavelet, bands.levels)
        energies = torch.stack([low.square().mean(), (difference - low).square().mean()])
        vector = _vector(weights, difference.device, difference.dtype)
        total, energies = torch.dot(energies, vector), energies.detach()
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
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, mask = ctx.saved_tensors
        shape, *dtypes = ctx.like
        # Not `outer` nor any other product of matrices, which an autocast around the backward pass would round.
        gradients = (coefficients[:, None] * gradient.reshape(1, -1)).view(shape)
        if mask is not None:
            gradients = gradients.mul_(mask)
        of_prediction = gradients.to(dtypes[0]) if ctx.needs_input_grad[0] else None
        of_target = -gradients.to(dtypes[1]) if ctx.needs_input_grad[1] else None
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
        middle = torch.bmm(_batched(rows.down, frames), frames) @ columns.down.T
        high = torch.baddbmm(
            frames, torch.bmm(_batched(rows.up, frames), middle), _batched(columns.up.T, frames), alpha=-1
        )
        energies = torch.stack([_product(middle, middle), _product(high, high)]) / frames.numel()
        ctx.save_for_backward(middle, high)
        ctx.rows, ctx.columns, ctx.weights, ctx.shape = rows, columns, (low_weight, high_weight), difference.shape
        ctx.mark_non_differentiable(energies)
        ctx.set_materialize_grads(False)
        like = difference.device, difference.dtype
        return torch.dot(energies, _vector((low_weight, high_weight), *like)), energies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if of_total is None:
            return None, None, None, None, None
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
        middle,
        torch.bmm(_batched(rows.up.T, high), high),
        _batched(columns.up, high),
        beta=low_weight,
        alpha=-high_weight,
    )
    scale = 2 / high.numel()
    outer = _batched(columns.down, high)
    return torch.baddbmm(
        high, torch.bmm(_batched(rows.down.T, high), inner), outer, beta=scale * high_weight, alpha=scale
    )


def _batched(matrix: Tensor, frames: Tensor) -> Tensor:
    """The matrix once for every frame, for `torch.bmm`; nothing is copied."""
    return matrix.expand(len(frames), -1, -1)


@operator
def _vector(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A few numbers on the device."""
    return torch.tensor(values, device=device, dtype=dtype)


class _FftEnergies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, difference: Tensor, low_weight: float, high_weight: float, cutoff: float
    ) -> tuple[Tensor, Tensor]:
        height, width = difference.shape[-2:]
        like = difference.device, difference.dtype
        spectrum = torch.fft.rfft2(difference)
        count = difference.numel()
        # |F|² summed over channels (and frames), per pixel of the latent because L_b is a mean.
        power = torch.view_as_real(spectrum).square().sum(dim=-1).flatten(end_dim=-3).sum(dim=0)
        weights = fft_weights(height, width, cutoff, *like)
        energies = torch.stack([_product(power, weights.low), _product(power, weights.high)]) / count
        # Both bands are projections, so the gradient of a band's energy is twice that band.
        ctx.save_for_backward(spectrum)
        ctx.gains = _fft_gains(height, width, cutoff, 2 * low_weight / count, 2 * high_weight / count, *like)
        ctx.shape = difference.shape
        ctx.mark_non_differentiable(energies)
        ctx.set_materialize_grads(False)
        return torch.dot(energies, _vector((low_weight, high_weight), *like)), energies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if of_total is None:
            return None, None, None, None
        (spectrum,) = ctx.saved_tensors
        gradient = torch.fft.irfft2(spectrum * ctx.gains, s=ctx.shape[-2:])
        return gradient.mul_(of_total), None, None, None


@operator
def _fft_gains(
    height: int, width: int, cutoff: float, low: float, high: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """``low`` inside the disc, ``high`` outside, on the layout of `torch.fft.rfft2`."""
    return high + (low - high) * fft_weights(height, width, cutoff, device, dtype).disc


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
