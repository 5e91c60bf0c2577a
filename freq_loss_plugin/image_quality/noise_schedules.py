"""The signal-to-noise ratio of latents at each timestep."""

from __future__ import annotations

import torch
from torch import Tensor

from ..loss.latents import NUM_TRAIN_TIMESTEPS, PredictionType


def signal_to_noise(prediction_type: PredictionType, alphas_cumprod: Tensor | None = None) -> Tensor:
    """SNR at the timesteps 0..999, shape (1000,), float64.

    Args:
        prediction_type: what the model predicts; see `freq_loss_plugin.loss.latents`.
        alphas_cumprod: alpha_bar of the schedule, for epsilon and v-prediction.
    """
    if prediction_type in ("epsilon", "v_prediction"):
        assert alphas_cumprod is not None
        signal = alphas_cumprod.detach().double().cpu()
        return signal / (1 - signal)
    noise_level = (torch.arange(NUM_TRAIN_TIMESTEPS, dtype=torch.float64) / NUM_TRAIN_TIMESTEPS).clamp(min=1e-6)
    return ((1 - noise_level) / noise_level).square()


def stable_diffusion_alphas(*, zero_terminal_snr: bool = False) -> Tensor:
    """alpha_bar of SD1.x, SD2.x and SDXL, shape (1000,): the scaled linear schedule from 0.00085 to 0.012.

    Args:
        zero_terminal_snr: rescaled to alpha_bar = 0 at the end (Lin et al. 2023, arXiv 2305.08891).
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float64).square()
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    if not zero_terminal_snr:
        return alphas_cumprod
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
