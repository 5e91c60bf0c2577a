"""Tiny autoencoders, distilled from those of real models; see `benchmarks.real_latents`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.real_latents import CACHE, FAMILIES, load_encoder
from freq_loss_plugin.image_quality.pixels import as_pixels


@torch.no_grad()
def encode(name: str, images: Sequence[Image.Image]) -> Tensor:
    """Latents of images of one size, shape (n, C, H/8, W/8).

    Raises:
        FileNotFoundError: the encoder is not there.
    """
    encoder = _encoder(name)
    # One at a time, which is nearly twice as fast: it stays in the processor's cache.
    pixels = [as_pixels(image)[None].contiguous(memory_format=torch.channels_last) for image in images]
    return torch.cat([encoder(each * 2 - 1) for each in pixels]).contiguous()


@torch.no_grad()
def decode(name: str, latents: Tensor) -> Tensor:
    """Pixels 0..1, shape (n, 3, 8H, 8W).

    Raises:
        FileNotFoundError: the decoder is not there.
    """
    decoder = _decoder(name)
    parts = latents.contiguous(memory_format=torch.channels_last).split(1)
    return torch.cat([(decoder(part) / 2 + 0.5).clamp(0, 1) for part in parts]).contiguous()


@lru_cache
def _encoder(name: str) -> nn.Module:
    try:
        encoder = load_encoder(name, CACHE)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}, or set FREQ_LOSS_AUTOENCODERS; the weights are on github.com/madebyollin/taesd too"
        ) from None
    return encoder.requires_grad_(False).to(memory_format=torch.channels_last)


@lru_cache
def _decoder(name: str) -> nn.Module:
    file = CACHE / f"{name}_decoder.safetensors"
    if not file.is_file():
        raise FileNotFoundError(
            f"no {file}: ComfyUI users have it in models/vae_approx, and it is on github.com/madebyollin/taesd; set "
            "FREQ_LOSS_AUTOENCODERS to its folder"
        )
    decoder: nn.Module = AutoencoderTiny(latent_channels=FAMILIES[name].channels).decoder
    weights = {}
    for key, value in load_file(file).items():
        # The first layer of the files limits values and has no weights; diffusers has it elsewhere.
        layer, rest = key.removeprefix("decoder.").split(".", 1)
        weights[f"layers.{int(layer) - 1}.{rest}"] = value.float()
    decoder.load_state_dict(weights)
    return decoder.eval().requires_grad_(False).to(memory_format=torch.channels_last)
