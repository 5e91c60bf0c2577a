"""The stages: the autoencoder, and the transformer with the text encoder."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from make_tiny_sd.architecture import finish
from make_tiny_sd.stage import Stage
from make_tiny_sd.tokenizer import load_or_make_tokenizer
from more_itertools import chunked
from PIL import Image
from torch import Tensor

from . import emoji
from .features import features_of
from .model import SIDE, TEXT_LENGTH, TinyFlow, load, make_vae

VAE_BATCH, FLOW_BATCH, SAMPLES = 6, 32, 96
UNCONDITIONAL = 0.1


def train_vae(options: argparse.Namespace, device: torch.device) -> None:
    """Train the autoencoder on emoji of the base style in all colors, and write it to ``options.output``."""
    torch.manual_seed(0)
    pixels = _pixels(options)
    vae = make_vae().to(device)
    with torch.no_grad():  # start with little noise: standard deviations of exp(-3)
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -6
    stage = Stage(options.work / "flow_vae.pt", {"vae": vae}, options.steps, rate=5e-3, decay=0.995)

    def loss_of_step(step: int) -> dict[str, Tensor]:
        batch = _augmented(pixels, step).to(device)
        posterior = vae.encode(batch).latent_dist
        error = vae.decode(posterior.sample()).sample - batch
        return {"l1": error.abs().mean(), "l2": error.square().mean(), "kl": 1e-6 * posterior.kl().mean()}

    stage.run(loss_of_step)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in (pixels[:256] * 2 - 1).to(device).split(16)])
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))
    vae.half().save_pretrained(options.output / "vae")


def train_flow(options: argparse.Namespace, device: torch.device) -> None:
    """Train the transformer and the text encoder, and write the whole model to ``options.output``."""
    if not (options.output / "vae").is_dir():
        raise SystemExit(f"no autoencoder in {options.output}: run the stage vae first")
    folder = emoji.fetch(options.emoji)
    concepts = emoji.concepts(folder)
    names = [concept.name for concept in concepts]
    captions = [*names, *(f"{style} style" for style in emoji.STYLES)]
    tokenizer = load_or_make_tokenizer(options.work / "flow_tokenizer", captions, TEXT_LENGTH)
    torch.manual_seed(1)
    model = TinyFlow(tokenizer)
    model.vae = type(model.vae).from_pretrained(options.output / "vae").float()
    model.to(device)
    latents = model.encode(_pixels(options))
    parts = {"transformer": model.transformer, "text_encoder": model.text_encoder}
    stage = Stage(options.work / "flow.pt", parts, options.steps, rate=6e-3, decay=0.998)

    def loss_of_step(step: int) -> dict[str, Tensor]:
        generator = np.random.default_rng((1, step))
        epoch, place = divmod(step * FLOW_BATCH, len(names))
        orders = [np.random.default_rng((2, number)).permutation(len(names)) for number in (epoch, epoch + 1)]
        chosen = np.concatenate(orders)[place : place + FLOW_BATCH]
        clean = latents[chosen]
        noise = torch.randn_like(clean)
        t = torch.from_numpy((generator.permutation(FLOW_BATCH) + generator.random(FLOW_BATCH)) / FLOW_BATCH)
        t = t.float().to(device)
        words = [names[i] if generator.random() > UNCONDITIONAL else "" for i in chosen]
        at = t[:, None, None, None]
        predicted = model.velocity((1 - at) * clean + at * noise, t, model.text(words))
        return {"mse": (predicted - (noise - clean)).square().mean()}

    stage.run(loss_of_step)
    model.save(options.output)
    finish(options.output)


def evaluate(options: argparse.Namespace, device: torch.device) -> None:
    """Print PSNR in all styles and how many samples look like their concept; draw a sheet of samples."""
    folder, model = emoji.fetch(options.emoji), load(options.output).to(device)
    concepts = emoji.concepts(folder)
    for style in emoji.STYLES:
        pixels = _as_pixels(emoji.images(folder, concepts[:64], style))
        mse = (model.decode(model.encode(pixels)) - pixels).square().mean(dim=(1, 2, 3))
        print(f"{style}: {(-10 * mse.log10()).mean():.1f} dB")
    noise = torch.randn(SAMPLES, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    names = [concept.name for concept in concepts[:SAMPLES]]
    parts = zip(chunked(names, 32), noise.split(32), strict=True)
    sampled = torch.cat([model.decode(model.sample(some, part.to(device))) for some, part in parts])
    drawn = _pixels(options)
    nearest = torch.cdist(features_of(sampled), features_of(drawn)).argmin(dim=1)
    right = (nearest == torch.arange(SAMPLES)).float().mean()
    print(f"nearest to their own concept: {right:.0%} of {SAMPLES} samples (chance {1 / len(drawn):.1%})")
    rows = [torch.cat(list(images[half]), dim=2) for half in (slice(16), slice(16, 32)) for images in (drawn, sampled)]
    sheet = (torch.cat(rows, dim=1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(sheet).save(options.output / "samples.png", optimize=True)


def _pixels(options: argparse.Namespace) -> Tensor:
    folder = emoji.fetch(options.emoji)
    return _as_pixels(emoji.images(folder, emoji.concepts(folder), "google"))


def _as_pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _augmented(pixels: Tensor, step: int) -> Tensor:
    """Images, -1..1: half have permuted colors, some are negatives, all are flipped and shifted at random."""
    generator = np.random.default_rng((0, step))
    batch = []
    for index in generator.integers(len(pixels), size=VAE_BATCH):
        image = pixels[index]
        if generator.random() < 0.5:
            image = image[torch.from_numpy(generator.permutation(3))]
        if generator.random() < 0.2:
            image = 1 - image
        if generator.random() < 0.5:
            image = image.flip(2)
        shifts = [int(shift) for shift in generator.integers(SIDE, size=2)]
        batch.append(image.roll(shifts, dims=(1, 2)))
    return torch.stack(batch) * 2 - 1
