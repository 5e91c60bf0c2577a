"""What ``inspect --vae`` can read: a folder of diffusers, or the encoder of a tiny autoencoder in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from ..image_quality.pixels import as_pixels
from ..image_quality.survey import Encode
from ..options.fields import ConfigError

_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
_EXPECTED = (
    f"expected a folder with a config.json of diffusers' {' or '.join(_CLASSES)}, or the encoder of a tiny autoencoder "
    "(github.com/madebyollin/taesd), like taef1_encoder.safetensors"
)
# The weights of the branch that FLUX.2's encoder has beside some blocks: see `_Pooling`.
_BRANCH = ("0.weight", "1.weight", "1.bias", "3.weight")


def load_encoder(path: Path) -> Encode:
    """A function from images to latents as a model is trained on them; it runs on the GPU if there is one.

    Raises:
        ConfigError: there is no such autoencoder.
    """
    if not path.exists():
        raise ConfigError(f"--vae {path}: there is no such file or folder; {_EXPECTED}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if path.is_dir():
        vae = _of_folder(path).eval().to(device)
        scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    else:
        encoder = _of_file(path).to(device)

    @torch.no_grad()
    def encode(image: Image.Image) -> Tensor:
        pixels = as_pixels(image)[None].to(device) * 2 - 1
        if path.is_file():
            return encoder(pixels)[0].cpu()
        encoded = vae.encode(pixels)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
        return ((latents[0] - shift) * scale).cpu()

    return encode


def _of_folder(folder: Path) -> Any:
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--vae {folder}: {error}; {_EXPECTED}") from None
    if name not in _CLASSES:
        raise ConfigError(f"--vae {folder}: its config.json is of {name}; {_EXPECTED}")
    return getattr(diffusers, name).from_pretrained(folder)


def _of_file(file: Path) -> nn.Module:
    try:
        return tiny_encoder(load_file(file))
    except Exception as error:  # noqa: BLE001 - safetensors and load_state_dict raise errors of several kinds
        raise ConfigError(f"--vae {file}: {str(error).splitlines()[0]}; {_EXPECTED}") from None


def tiny_encoder(weights: Mapping[str, Tensor]) -> nn.Module:
    """The encoder of a tiny autoencoder (github.com/madebyollin/taesd): of images (B, 3, H, W) in -1..1.

    Args:
        weights: as its file has them.

    Raises:
        KeyError: these are no weights of such an encoder.
        RuntimeError: the same.
    """
    weights = {key.removeprefix("encoder."): value.float() for key, value in weights.items()}
    encoder: Any = diffusers.AutoencoderTiny(latent_channels=len(weights["14.weight"])).encoder
    encoder.load_state_dict({f"layers.{key}": value for key, value in weights.items() if ".pool." not in key})
    for number, block in enumerate(encoder.layers):
        if f"{number}.pool.0.weight" in weights:
            branch = [weights[f"{number}.pool.{name}"] for name in _BRANCH]
            encoder.layers[number] = nn.Sequential(_Pooling(branch), block)
    return encoder.eval()


class _Pooling(nn.Module):
    """Adds features that are normalized over the whole image, as FLUX.2's encoder does before three blocks.

    Args:
        weights: of a 1×1 convolution, scale and bias of a normalization of four groups, and of another convolution.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (B, C, H, W)."""
        first, scale, bias, last = self.weights
        return x + F.conv2d(F.group_norm(F.conv2d(x, first), 4, scale, bias).relu(), last)
