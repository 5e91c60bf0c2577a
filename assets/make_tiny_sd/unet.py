"""The stage unet: the UNet and the text encoder, on latents of the autoencoder."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from more_itertools import chunked
from torch import Tensor
from transformers import CLIPTextModel

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.training.loss_balance import LossBalance
from freq_loss_plugin.training.passes import Pass

from .architecture import NOISE_SCHEDULE, SCALING_FACTOR, load_pipeline, load_vae, make_unet, save_pipeline, text_config
from .images import TRAINING, draw_all, random_scenes
from .stage import Stage
from .tokenizer import load_or_make_tokenizer, token_ids

BATCH = 16
# Fraction of empty captions, for classifier-free guidance.
UNCONDITIONAL = 0.1


def train_unet(options: argparse.Namespace, device: torch.device) -> None:
    """Train both and write the whole pipeline to ``options.output``."""
    vae = load_vae(options.output, device)
    torch.manual_seed(1)
    if options.start:
        earlier = load_pipeline(options.start, device)
        tokenizer, text_encoder, unet = earlier.tokenizer, earlier.text_encoder, earlier.unet
    else:
        tokenizer = load_or_make_tokenizer(options.work / "tokenizer")
        unet, text_encoder = make_unet(), CLIPTextModel(text_config(tokenizer))
    unet, text_encoder = unet.to(device), text_encoder.to(device)
    # The running mean of the loss at a noise level divides it: all levels count alike, the highest ones included.
    balance = LossBalance(FreqLossConfig(balance="timestep", balance_power=1.0))
    modules = {"unet": unet, "text_encoder": text_encoder}
    stage = Stage(options.work / "unet.pt", modules, options.steps, rate=6e-3, decay=0.998, others=[balance])
    latents, captions = encoded_images(vae, options.images, options.work, device)
    scheduler = DDPMScheduler(**NOISE_SCHEDULE)

    def loss_of_step(step: int) -> dict[str, Tensor]:
        generator = np.random.default_rng((TRAINING, step, 3))
        chosen = generator.integers(len(captions), size=BATCH)
        mean, deviation = latents[chosen].to(device).chunk(2, dim=1)
        clean = SCALING_FACTOR * (mean + deviation * torch.randn_like(mean))
        noise = low_frequency_noise(clean)
        timesteps = random_timesteps(generator).to(device)
        words = [captions[i] if generator.random() > UNCONDITIONAL else "" for i in chosen]
        states = text_encoder(token_ids(tokenizer, words, device))[0]
        predicted = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, states).sample
        weights = balance.balance(Pass(predicted, noise, timesteps, scheduler.alphas_cumprod)).weights
        return {"balanced mse": (weights * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()}

    stage.run(loss_of_step)
    save_pipeline(options.output, vae, unet, text_encoder, tokenizer)


def low_frequency_noise(clean: Tensor) -> Tensor:
    """White noise plus an offset per channel and smooth blobs, shape as ``clean``.

    Even at the last timestep of SD's schedule enough of the image is left to read brightness and position from it. A
    model that learns to do so ignores those words and takes both from the noise when it samples; noise of low frequency
    hides them.
    """
    noise = torch.randn_like(clean)
    noise = noise + 0.15 * torch.randn(*noise.shape[:2], 1, 1, device=clean.device)
    blobs = torch.randn(*noise.shape[:2], 4, 4, device=clean.device)
    return noise + 0.4 * F.interpolate(blobs, noise.shape[2:], mode="bilinear")


def random_timesteps(generator: np.random.Generator) -> Tensor:
    """Half of the batch over all timesteps, half over those above 850, where the caption alone can help."""
    return torch.from_numpy(np.concatenate((stratified(generator, 0, 1000), stratified(generator, 850, 1000))))


def stratified(generator: np.random.Generator, first: int, end: int, count: int = BATCH // 2) -> np.ndarray:
    """``count`` timesteps, one from each part of the range: uniform, with less variance from step to step."""
    return (first + (np.arange(count) + generator.random(count)) / count * (end - first)).astype(np.int64)


@torch.no_grad()
def encoded_images(vae: AutoencoderKL, count: int, work: Path, device: torch.device) -> tuple[Tensor, list[str]]:
    """Means and standard deviations of the latents of ``count`` images, shape (count, 8, 16, 16), and their captions.

    Cached in ``work`` under the number of images and the weights of the autoencoder.
    """
    scenes = random_scenes((TRAINING, 0, 4), count)
    captions = [scene.caption() for scene in scenes]
    weights = sum(parameter.double().abs().sum().item() for parameter in vae.parameters())
    file = work / f"latents_{count}_{weights:.6f}.pt"
    if file.exists():
        return torch.load(file), captions
    parts = []
    for batch in chunked(scenes, BATCH):
        posterior = vae.encode(draw_all(batch).to(device)).latent_dist
        parts.append(torch.cat((posterior.mean, posterior.std), dim=1).cpu())
    latents = torch.cat(parts)
    torch.save(latents, file)
    return latents, captions
