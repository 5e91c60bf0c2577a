r"""The loss of `freq_loss_plugin.loss.reference` as training computes it.

Everything inside its square is linear, so with the k of `residual_scale`

    D   = sum_i w_i·k_i·m_i·(prediction_i - target_i)        one tensor of shape (C, H, W)
    L_b = mean of band_b(D)²

and one tensor is split instead of 2B; the noisy latents are not needed. For the wavelet bands the low band is two small
matrix products and the high band is D minus it; for the FFT bands Parseval's theorem gives both energies from the
spectrum of D, with no inverse transform (`freq_loss_plugin.loss.energies`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, autocast

from .bands import Bands, computation_dtype
from .energies import band_energies, batch_difference
from .latents import PredictionType, residual_scale
from .params import BandSpec, FrequencyLoss, HasLossSpec, check_batch
from .sample_weights import batch_weights


def frequency_matching_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    prediction_type: PredictionType,
    timesteps: Tensor | float | None,
    alphas_cumprod: Tensor | None = None,
    sigmas: Tensor | None = None,
    sample_weights: Tensor | None = None,
    mask: Tensor | None = None,
    config: HasLossSpec,
    combine: Callable[[Tensor], Tensor] | None = None,
) -> FrequencyLoss:
    r"""Match the batch sum of predicted clean latents to that of the clean latents, band by band.

    .. math:: total = dist\_match \, (low\_weight \, L_{low} + high\_weight \, L_{high}), \quad
              L_b = \operatorname{mean}\big(band_b(D)^2\big), \quad D = \sum_i w_i k_i m_i (prediction_i - target_i)

    Equal to `reference_loss` up to rounding. Runs in float32 (float64 for float64 input) inside any autocast, and never
    waits for the device.

    Args:
        prediction: what the model returned, shape (B, C, H, W) or (B, C, T, H, W).
        target: what it should have returned, same shape.
        prediction_type: ``"epsilon"``, ``"v_prediction"``, ``"flow"`` (the sign of v does not matter: the loss is a
            square), or ``"sample"`` where both are clean latents already.
        timesteps: shape (B,) or one number, on the 0..1000 scale. Not needed for ``"sample"`` without a window.
        alphas_cumprod: alpha_bar, shape (1000,), for epsilon and v_prediction. Keep it on the device of ``timesteps``.
        sigmas: the exact s of flow matching, shape (B,); ``timesteps / 1000`` where left out.
        sample_weights: w_i, shape (B,), for instance the trainer's weights of regularization images; 1 where left out.
            They multiply the weights that ``config`` asks for (`batch_weights`).
        mask: m, broadcastable to ``prediction``, for instance (B, 1, H, W). It multiplies the latents before they are
            split.
        config: a `LossSpec`, or options that make one. Its ``dist_match`` may be 0: the total is then 0, with a zero
            gradient.
        combine: given D, returns the D whose bands are compared: joined with that of other processes
            (`freq_loss_plugin.training.distributed`).

    Returns:
        `FrequencyLoss` ``(total, low, high)``.

    Raises:
        TypeError: a tensor that is not floating point.
        ValueError: shapes that do not fit, an unknown prediction type, a missing schedule, or latents that are too
            small for the wavelet levels.

    Example:
        >>> prediction, target = torch.randn(4, 4, 64, 64, requires_grad=True), torch.randn(4, 4, 64, 64)
        >>> loss = frequency_matching_loss(prediction, target, prediction_type="flow", timesteps=400, config=LossSpec())
        >>> loss.total.backward()
    """
    spec = config.loss_spec
    check_batch(prediction, target, spec.bands, timesteps=timesteps, sigmas=sigmas, sample_weights=sample_weights)
    with autocast(prediction.device.type, enabled=False):
        dtype = computation_dtype(prediction, target)
        scale = residual_scale(prediction_type, timesteps, alphas_cumprod, sigmas)
        weights = batch_weights(prediction_type, timesteps, alphas_cumprod, sigmas, sample_weights, spec)
        coefficients = _product(weights, scale, prediction.new_empty(prediction.shape[0], dtype=dtype))
        if spec.reduction == "mean":
            coefficients = coefficients / len(prediction)
        difference = batch_difference(prediction, target, coefficients, None if mask is None else mask.to(dtype))
        if combine is not None:
            difference = combine(difference)
        return FrequencyLoss(*band_energies(difference, spec))


def band_error_maps(difference: Tensor, bands: BandSpec) -> Bands:
    """Where L_low and L_high come from: the squared bands of D, averaged over everything but the position.

    Args:
        difference: D = sum_i w_i·k_i·(prediction_i - target_i), shape (C, H, W) or (C, T, H, W).
        bands: how it is split.

    Returns:
        `Bands` of shape (H, W) each; their means are L_low and L_high.
    """
    return Bands(*(band.square().flatten(end_dim=-3).mean(dim=0) for band in bands.split(difference.unsqueeze(0))))


def _product(weights: Tensor | float, scale: Tensor | float, like: Tensor) -> Tensor:
    """w·k, shape (B,) and otherwise like ``like``: 0 where w is, even where k is infinite (zero terminal SNR)."""
    if not isinstance(weights, Tensor):
        product = weights * scale if weights else 0.0
        return product.to(like).expand_as(like) if isinstance(product, Tensor) else torch.full_like(like, product)
    weights = weights.to(like)
    scale = scale.to(like) if isinstance(scale, Tensor) else scale
    return torch.where(weights == 0, weights, weights * scale).expand_as(like)
