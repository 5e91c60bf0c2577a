"""How a prediction becomes a clean latent, and how much of its error that carries along.

A diffusion model sees x_t, a mixture of the clean latent x0 and noise n, and predicts one of several things. Each can
be turned back into an estimate x0_hat of the clean latent, with A = sqrt(alpha_bar_t), alpha_bar = ``alphas_cumprod``,
S = sqrt(1 - alpha_bar_t), and the mixing fraction s of flow matching:

    prediction type    x_t                   prediction             x0_hat                   k
    epsilon            A·x0 + S·n            eps_hat, near n        (x_t - S·eps_hat) / A    -S / A
    v_prediction       A·x0 + S·n            v_hat, near A·n - S·x0 A·x_t - S·v_hat          -S
    flow               (1 - s)·x0 + s·n      v_hat, near n - x0     x_t - s·v_hat            -s
    sample             any                   x0_hat                 x0_hat                   1

Every row is linear in the prediction, so the error of the clean latent is ``x0_hat - x0 = k·(prediction - target)``:
x_t cancels. `recover_latent` is the third column, `residual_scale` the last one.

Sources: epsilon, Ho et al. 2020 (arXiv 2006.11239) eq. 9 and 15; v, Salimans & Ho 2022 (arXiv 2202.00512) §4; flow,
Lipman et al. 2022 (arXiv 2210.02747) with the straight path. v is solved directly instead of by way of eps, which is
the same numbers but stays finite where alpha_bar_t = 0 (zero terminal SNR).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "flow", "sample"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)

# The scale on which every trainer counts timesteps; flow models call s·1000 the timestep.
NUM_TRAIN_TIMESTEPS = 1000


def recover_latent(
    prediction: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor | float,
    alphas_cumprod: Tensor | None,
    prediction_type: PredictionType,
    *,
    sigmas: Tensor | None = None,
) -> Tensor:
    """Turn a model prediction (or its target) into the clean latent that it stands for.

    Equations and sources: the table at the top of `freq_loss_plugin.loss.latents`.

    Args:
        prediction: shape (B, C, H, W) or (B, C, T, H, W).
        noisy_latents: x_t, same shape.
        timesteps: shape (B,), or one number for the whole batch, on the 0..1000 scale.
        alphas_cumprod: alpha_bar of the scheduler, shape (1000,); needed for epsilon and v_prediction, otherwise None.
        prediction_type: ``"epsilon"``, ``"v_prediction"``, ``"flow"`` or ``"sample"``.
        sigmas: the exact s of flow matching, shape (B,) or broadcastable from it; ``timesteps / 1000`` where left out.

    Returns:
        x0_hat, of the shape of ``prediction``. Infinite for epsilon where alpha_bar_t = 0: such a prediction says
        nothing about x0.

    Raises:
        ValueError: an unknown prediction type, or ``alphas_cumprod`` missing where it is needed.

    Example:
        >>> noisy, velocity = torch.ones(1, 4, 8, 8), torch.full((1, 4, 8, 8), 0.5)
        >>> recover_latent(velocity, noisy, 500, None, "flow").mean().item()  # 1 - 0.5·0.5
        0.75
    """
    if prediction_type == "sample":
        return prediction
    if prediction_type == "flow":
        return noisy_latents - _per_sample(flow_sigma(timesteps, sigmas), prediction) * prediction
    alpha_bar = _per_sample(select_alpha_bar(timesteps, alphas_cumprod, prediction_type), prediction)
    signal, noise = _square_root(alpha_bar), _square_root(1 - alpha_bar)
    if prediction_type == "epsilon":
        return (noisy_latents - noise * prediction) / signal
    return signal * noisy_latents - noise * prediction


def residual_scale(
    prediction_type: PredictionType,
    timesteps: Tensor | float | None,
    alphas_cumprod: Tensor | None = None,
    sigmas: Tensor | None = None,
) -> Tensor | float:
    """k in ``x0_hat - x0 = k·(prediction - target)``: shape (B,), or a number where one number describes the batch.

    Arguments and errors as in `recover_latent`.
    """
    if prediction_type == "sample":
        return 1.0
    if prediction_type == "flow":
        return -flow_sigma(timesteps, sigmas)
    alpha_bar = select_alpha_bar(timesteps, alphas_cumprod, prediction_type)
    noise = _square_root(1 - alpha_bar)
    return -noise / _square_root(alpha_bar) if prediction_type == "epsilon" else -noise


def flow_sigma(timesteps: Tensor | float | None, sigmas: Tensor | float | None = None) -> Tensor | float:
    """s of flow matching: ``sigmas`` flattened to (B,) where given, otherwise ``timesteps / 1000``."""
    if sigmas is not None:
        return sigmas.flatten() if isinstance(sigmas, Tensor) else sigmas
    if timesteps is None:
        raise ValueError("prediction_type = 'flow' needs timesteps or sigmas, and got neither")
    if isinstance(timesteps, Tensor):
        timesteps = timesteps.to(torch.promote_types(timesteps.dtype, torch.float32))
    return timesteps / NUM_TRAIN_TIMESTEPS


def select_alpha_bar(
    timesteps: Tensor | float | None, alphas_cumprod: Tensor | None, prediction_type: str
) -> Tensor | float:
    """alpha_bar_t, shape (B,). A number for one timestep of a schedule on the CPU: the GPU is then not touched."""
    if prediction_type not in PREDICTION_TYPES:
        allowed = ", ".join(map(repr, PREDICTION_TYPES))
        raise ValueError(f"prediction_type = {prediction_type!r}: expected one of {allowed}")
    if alphas_cumprod is None or timesteps is None:
        missing = "alphas_cumprod" if alphas_cumprod is None else "timesteps"
        raise ValueError(
            f"prediction_type = {prediction_type!r} needs {missing}, and got None; "
            "pass noise_scheduler.alphas_cumprod and the timesteps of the batch"
        )
    if not isinstance(timesteps, Tensor):
        selected = alphas_cumprod[int(timesteps)]
        return float(selected) if selected.device.type == "cpu" else selected
    return alphas_cumprod.to(timesteps.device)[timesteps.long().flatten()]


def signal_to_noise(alpha_bar: Tensor | float) -> Tensor | float:
    """SNR = alpha_bar / (1 - alpha_bar)."""
    return alpha_bar / (1 - alpha_bar)


def _square_root(value: Tensor | float) -> Tensor | float:
    return value**0.5


def _per_sample(value: Tensor | float, like: Tensor) -> Tensor | float:
    """Shape (B,) -> (B, 1, 1, 1) so that it multiplies ``like`` sample by sample; numbers pass."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value.reshape(-1, *([1] * (like.ndim - 1))).to(device=like.device)
