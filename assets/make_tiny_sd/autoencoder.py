"""The stage vae: the autoencoder, on crops of 64 pixels."""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from freq_loss_plugin.toy_model.scenes import SIZE

from .architecture import SCALING_FACTOR, make_vae
from .images import TRAINING, VALIDATION, augmented_image, draw_all, random_scenes, to_tensor
from .stage import Stage

BATCH, CROP = 4, 64
# Orthonormal axes of brightness and of two opponent colors. Color errors weigh more: most of an image is gray, and an
# autoencoder that may choose spends all four channels on brightness.
_AXES = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]])
OPPONENT = _AXES / _AXES.norm(dim=1, keepdim=True) * torch.tensor([[1.0], [5.0], [5.0]])


def train_vae(options: argparse.Namespace, device: torch.device) -> None:
    """Train the autoencoder and write it to ``options.output``."""
    torch.manual_seed(0)
    vae = make_vae().to(device)
    with torch.no_grad():  # start with little noise: standard deviations of exp(-3)
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -6
    stage = Stage(options.work / "vae.pt", {"vae": vae}, options.steps, rate=5e-3, decay=0.995)

    def loss_of_step(step: int) -> dict[str, Tensor]:
        pixels = random_crops(step).to(device)
        posterior = vae.encode(pixels).latent_dist
        error = torch.einsum("dc,bchw->bdhw", OPPONENT.to(device), vae.decode(posterior.sample()).sample - pixels)
        # At first it only keeps the latents from drifting (they are rescaled to unit variance afterwards); then it
        # makes them noisier, so that the decoder forgives the small errors of a sampler.
        kl_weight = 1e-6 if step < 0.7 * options.steps else 1e-5
        return {"l1": error.abs().mean(), "l2": error.square().mean(), "kl": kl_weight * posterior.kl().mean()}

    stage.run(loss_of_step)
    vae.eval()
    fit_scaling_factor(vae, device)
    print(f"validation PSNR {reconstruction_psnr(vae, device):.2f} dB")
    vae.half().save_pretrained(options.output / "vae")


def random_crops(step: int) -> Tensor:
    """The batch of a step, shape (4, 3, 64, 64), -1..1."""
    generator = np.random.default_rng((TRAINING, step))
    crops = []
    for _ in range(BATCH):
        image = augmented_image(generator)
        top, left = generator.integers(0, SIZE - CROP + 1, size=2)
        crops.append(image[top : top + CROP, left : left + CROP])
    return to_tensor(crops)


@torch.no_grad()
def reconstruction_psnr(vae: nn.Module, device: torch.device, count: int = 64) -> float:
    """Mean PSNR in dB over whole validation images of the base style, coded with the mean of the posterior."""
    decibels = []
    for pixels in draw_all(random_scenes(VALIDATION, count)).to(device).split(8):
        restored = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        mse = ((restored - pixels) / 2).square().mean(dim=(1, 2, 3))
        decibels.append(-10 * mse.log10())
    return torch.cat(decibels).mean().item()


@torch.no_grad()
def fit_scaling_factor(vae: AutoencoderKL, device: torch.device) -> None:
    """Rescale the latents, inside the autoencoder, so that SD's fixed factor gives them unit variance.

    The last layer of the encoder returns (mean, log variance): the means are multiplied by r, the log variances gain
    2·ln r; the first layer of the decoder divides by r. Reconstructions stay the same.
    """
    pixels = draw_all(random_scenes(TRAINING, 64)).to(device)
    ratio = (1 / (SCALING_FACTOR * vae.encode(pixels).latent_dist.sample().std())).item()
    channels = vae.config.latent_channels
    vae.quant_conv.weight[:channels] *= ratio
    vae.quant_conv.bias[:channels] *= ratio
    vae.quant_conv.bias[channels:] += 2 * math.log(ratio)
    vae.post_quant_conv.weight /= ratio
