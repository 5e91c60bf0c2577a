"""w_i: how much each sample counts in the batch sum."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .latents import NUM_TRAIN_TIMESTEPS, PredictionType, select_alpha_bar, signal_to_noise
from .params import LossSpec


def batch_weights(
    prediction_type: PredictionType,
    timesteps: Tensor | float | None,
    alphas_cumprod: Tensor | None,
    sigmas: Tensor | None,
    sample_weights: Tensor | None,
    spec: LossSpec,
) -> Tensor | float:
    r"""The given sample weights times what ``spec`` asks for.

    - ``sample_weighting = "min_snr"``: `min_snr_weights`.
    - a ``window``: 1 where first <= t < end, otherwise 0.

    Args:
        prediction_type: see `freq_loss_plugin.loss.latents`.
        timesteps: shape (B,) or one number, on the scale 0..1000.
        alphas_cumprod: alpha_bar of the scheduler, shape (1000,), for min_snr.
        sigmas: the exact s of flow matching, shape (B,), from which the timesteps follow where they are None.
        sample_weights: shape (B,), for instance the trainer's weights of regularization images; 1 where None.
        spec: the loss.

    Returns:
        Shape (B,), or a number that holds for all.

    Raises:
        ValueError: min_snr for flow or sample, where it is not defined; a window without timesteps.
    """
    weights: Tensor | float = 1.0
    if spec.sample_weighting == "min_snr":
        weights = min_snr_weights(prediction_type, timesteps, alphas_cumprod, spec.min_snr_gamma)
    if spec.window is not None:
        weights = weights * _inside(spec.window, timesteps, sigmas)
    if sample_weights is not None:
        weights = weights * sample_weights.flatten()
    return weights


def min_snr_weights(
    prediction_type: PredictionType, timesteps: Tensor | float | None, alphas_cumprod: Tensor | None, gamma: float
) -> Tensor | float:
    """Min-SNR weights: min(SNR, gamma)/SNR for epsilon, min(SNR, gamma)/(SNR + 1) for v_prediction.

    SNR = alpha_bar / (1 - alpha_bar).

    Source: Hang et al. 2023 (arXiv 2303.09556), in the form that sd-scripts uses.

    Args:
        prediction_type: ``"epsilon"`` or ``"v_prediction"``.
        timesteps: shape (B,), or one number.
        alphas_cumprod: alpha_bar of the scheduler, shape (1000,).
        gamma: the cap of the SNR, 5 in the paper.

    Returns:
        Shape (B,), or a number for one timestep.

    Raises:
        ValueError: another prediction type, for which they are not defined.
    """
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            "Min-SNR weights are defined for epsilon and v_prediction, and this model predicts "
            f"{prediction_type!r}; set sample_weighting = 'none'"
        )
    alpha_bar = torch.as_tensor(select_alpha_bar(timesteps, alphas_cumprod, prediction_type), dtype=torch.float32)
    snr = cast(Tensor, signal_to_noise(alpha_bar))
    # For epsilon this is min(SNR, gamma)/SNR, written so that it has its limit 1 where SNR is 0.
    weights = (gamma / snr).clamp(max=1.0) if prediction_type == "epsilon" else snr.clamp(max=gamma) / (snr + 1)
    return float(weights) if weights.ndim == 0 and weights.device.type == "cpu" else weights


def in_window(timesteps: Tensor, window: tuple[int, int]) -> Tensor:
    """Where first <= t < end, for a window (first, end); boolean, shape as ``timesteps``."""
    return (timesteps >= window[0]) & (timesteps < window[1])


def _inside(window: tuple[int, int], timesteps: Tensor | float | None, sigmas: Tensor | None) -> Tensor | float:
    if timesteps is None:
        if sigmas is None:
            raise ValueError("a window needs the timesteps of the batch, and got None")
        timesteps = sigmas * NUM_TRAIN_TIMESTEPS
    if not isinstance(timesteps, Tensor):
        return float(window[0] <= timesteps < window[1])
    return in_window(timesteps, window).flatten().to(torch.float32)
