r"""From which noise level on a defect can no longer be seen.

With dz the difference between the latents of an image with and without the defect, an ideal observer of the noisy
latents tells both apart with the detectability

.. math:: d'^2(t) = SNR(t) \cdot \|\Delta z\|^2, \qquad SNR = \frac{\bar\alpha_t}{1 - \bar\alpha_t}
          \quad\text{or, for flow matching,}\quad \left(\frac{1 - \sigma}{\sigma}\right)^2

A network sees patches, not a large image at once, so |dz|^2 is that of a patch of 128×128 pixels.

Source: the principle, G. Daras et al. (2025), Ambient Diffusion Omni, arXiv 2506.10038; d' is that of signal detection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..loss.latents import NUM_TRAIN_TIMESTEPS, PredictionType

PATCH_PIXELS = 128
# Above this even the worst image may train: its largest shapes and its colors are right.
HIGHEST = 900


def patch_energy(difference: Tensor, pixels: int, image_pixels: int) -> float:
    """|dz|^2 of a patch of `PATCH_PIXELS`², or of the whole image if that is smaller; on average over the difference.

    Args:
        difference: dz, any shape.
        pixels: how many pixels of the image it covers.
        image_pixels: how many the image has.
    """
    return float(difference.double().square().sum()) * min(PATCH_PIXELS**2, image_pixels) / pixels


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


def least_timestep(energy: float, snr: Tensor, threshold: float) -> int:
    """The first timestep from which on d'² stays below ``threshold``; at most `HIGHEST`.

    Args:
        energy: |dz|^2 of a patch.
        snr: see `signal_to_noise`; it falls with the timestep.
        threshold: of d'².
    """
    seen = (snr * energy >= threshold).nonzero()
    return min(int(seen.max()) + 1, HIGHEST) if len(seen) else 0
