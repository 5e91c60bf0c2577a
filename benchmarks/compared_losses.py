"""The losses that `loss_cost` compares: functions of prediction, target and noisy latents at one timestep of SD1.5."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "quality"))

from terms import Statistic, mmd, moments, spectrum

from freq_loss_plugin import FreqLossConfig, frequency_matching_loss
from freq_loss_plugin.loss import wavelet_library
from freq_loss_plugin.training.passes import Pass

Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
Split: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]

TIMESTEP = 400
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)


def all_losses(device: torch.device) -> dict[str, Loss]:
    """Every loss of the first table by name, plain MSE first."""
    return {
        "mse": lambda prediction, target, _: F.mse_loss(prediction, target),
        "formula, wavelet": formula(wavelet_split(device)),
        "formula, fft": formula(fft_split),
        **published(device),
        "ours, wavelet": ours(),
        "ours, fft": ours(method="fft"),
    }


def ours(**options: Any) -> Loss:
    """`frequency_matching_loss` with these fields of `FreqLossConfig`."""
    config = FreqLossConfig(**options)

    def loss(prediction: Tensor, target: Tensor, _: Tensor) -> Tensor:
        return frequency_matching_loss(
            prediction,
            target,
            prediction_type="epsilon",
            timesteps=TIMESTEP,
            alphas_cumprod=ALPHAS_CUMPROD,
            config=config,
        ).total

    return loss


def formula(split: Split) -> Loss:
    """The loss as the formula is written, with ``split`` for the bands."""
    alpha_bar = ALPHAS_CUMPROD[TIMESTEP].item()
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5

    def loss(prediction: Tensor, target: Tensor, noisy: Tensor) -> Tensor:
        predicted_low, predicted_high = split((noisy - noise * prediction) / signal)
        clean_low, clean_high = split((noisy - noise * target) / signal)
        low = F.mse_loss(predicted_low.sum(0), clean_low.sum(0))
        high = F.mse_loss(predicted_high.sum(0), clean_high.sum(0))
        return 0.003 * (0.7 * low + 0.3 * high)

    return loss


def wavelet_split(device: torch.device) -> Split:
    """Both bands by pytorch_wavelets."""
    library = wavelet_library.load()
    forward = library.DWTForward(J=2, wave="db3", mode="zero").to(device)
    inverse = library.DWTInverse(wave="db3", mode="zero").to(device)

    def split(latents: Tensor) -> tuple[Tensor, Tensor]:
        approximation, details = forward(latents)
        low = inverse((approximation, [torch.zeros_like(detail) for detail in details]))
        return low, inverse((torch.zeros_like(approximation), details))

    return split


def fft_split(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Both bands by fftshift and a disc."""
    height, width = latents.shape[-2:]
    rows = torch.arange(height, device=latents.device)[:, None] - height // 2
    columns = torch.arange(width, device=latents.device)[None, :] - width // 2
    disc = (rows**2 + columns**2 <= (min(height, width) // 4) ** 2).float()
    shifted = torch.fft.fftshift(torch.fft.fft2(latents), dim=(-2, -1))

    def inverse(masked: Tensor) -> Tensor:
        return torch.fft.ifft2(torch.fft.ifftshift(masked, dim=(-2, -1))).real

    return inverse(shifted * disc), inverse(shifted * (1 - disc))


def published(device: torch.device) -> dict[str, Loss]:
    """The losses of other packages, where these are installed."""
    losses: dict[str, Loss] = {}
    with contextlib.suppress(ImportError):
        import ptwt

        def split(latents: Tensor) -> tuple[Tensor, Tensor]:
            low, *details = ptwt.wavedec2(latents, "db3", mode="zero", level=2)
            zeros = [type(detail)(*map(torch.zeros_like, detail)) for detail in details]
            height, width = latents.shape[-2:]
            coefficients = (low, *zeros), (torch.zeros_like(low), *details)
            first, second = (ptwt.waverec2(band, "db3")[..., :height, :width] for band in coefficients)
            return first, second

        losses["formula, ptwt"] = formula(split)
    with contextlib.suppress(ImportError):
        wavelet_library.load()  # which wavelet-loss imports
        from wavelet_loss import WaveletLoss

        wavelet = WaveletLoss(device=device)
        losses["wavelet-loss"] = lambda prediction, target, _: wavelet(prediction, target)[0]
    with contextlib.suppress(ImportError):
        from focal_frequency_loss import FocalFrequencyLoss

        focal = FocalFrequencyLoss()
        losses["focal"] = lambda prediction, target, _: focal(prediction, target)
    return losses


def statistics_of_the_study() -> dict[str, Loss]:
    """The statistics in `quality/terms.py` that are no part of the loss; the noisy latents stand for clean ones."""

    def loss(statistic: Statistic) -> Loss:
        return lambda prediction, target, clean: statistic(Pass(prediction, target, TIMESTEP, ALPHAS_CUMPROD), clean)

    return {statistic.__name__: loss(statistic) for statistic in (moments, spectrum, mmd)}
