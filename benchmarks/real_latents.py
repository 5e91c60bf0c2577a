"""What defects of photographs do to the latents of real models, and what a filter can take back.

    python benchmarks/real_latents.py PHOTOS... [--autoencoders FOLDER] [--names taesd taesd3 taef1] [--references 8]

PHOTOS are sharp images or folders of them, of which the first ``--references`` are taken, 512 pixels from the middle of
each. The autoencoders are tiny ones, distilled from those of SD1.5 (taesd), SDXL (taesdxl), SD3 (taesd3) and FLUX.1
(taef1): files like ``taef1_encoder.safetensors``, as ComfyUI users have them in ``models/vae_approx``, in FOLDER or in
the cache folder of this project's tests. Their latents are close to the real ones, not the same.

For each defect the table has

- the least timestep of freq_loss_image_quality (d'^2 < 16), for the noise schedule of the model;
- the common shift of the channel means, its squared norm, and the variance of these means between photographs;
- the fraction of the squared error that is left after restoring (`freq_loss_plugin.image_quality.restoration`), by
  photographs that were left out of the fit, and the fraction left by moving the means alone;
- the least timestep at which the error that remains biases a denoiser by at most 5% of its own error, before and after.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from freq_loss_plugin.image_files import open_rgb
from freq_loss_plugin.image_folders import of_folder
from freq_loss_plugin.image_quality import restoration
from freq_loss_plugin.image_quality.defects import Defect
from freq_loss_plugin.image_quality.detectability import (
    least_timestep,
    patch_energy,
    signal_to_noise,
    stable_diffusion_alphas,
)
from freq_loss_plugin.image_quality.pixels import as_pixels
from freq_loss_plugin.options.config import FreqLossConfig

CACHE = Path.home() / ".cache" / "freq_loss_plugin" / "autoencoders"
SIDE = 512
# 5% of a denoiser's own error.
FRACTION = 0.05
DEFECTS = {
    "half the resolution": Defect(resolution=0.5),
    "a quarter": Defect(resolution=0.25),
    "an eighth": Defect(resolution=0.125),
    "JPEG 70": Defect(jpeg=70),
    "JPEG 40": Defect(jpeg=40),
    "JPEG 10": Defect(jpeg=10),
    "noise 10": Defect(noise=10.0),
    "noise 20": Defect(noise=20.0),
}


class Family(NamedTuple):
    """A model whose latents the autoencoder has; ``flow`` is whether it predicts a velocity."""

    model: str
    channels: int
    flow: bool


FAMILIES = {
    "taesd": Family("SD1.5", 4, False),
    "taesdxl": Family("SDXL", 4, False),
    "taesd3": Family("SD3", 16, True),
    "taef1": Family("FLUX.1", 16, True),
}


def load_encoder(name: str, folder: Path) -> nn.Module:
    """An encoder, a function of images (B, 3, H, W) in -1..1.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    file = folder / f"{name}_encoder.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}; ComfyUI users have it in models/vae_approx: give --autoencoders FOLDER")
    encoder: nn.Module = AutoencoderTiny(latent_channels=FAMILIES[name].channels).encoder
    weights = {f"layers.{key.removeprefix('encoder.')}": value.float() for key, value in load_file(file).items()}
    encoder.load_state_dict(weights)
    return encoder.eval()


def middle(file: Path) -> Image.Image:
    """The middle of a photograph, `SIDE`² pixels or the multiple of 64 that fits."""
    image = open_rgb(file)
    width, height = (min(SIDE, side // 64 * 64) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@torch.no_grad()
def encode(encoder: nn.Module, images: Sequence[Image.Image]) -> list[Tensor]:
    """The latents of each image, shape (C, H, W)."""
    return [encoder(as_pixels(image)[None] * 2 - 1)[0] for image in images]


def row(sharp: list[Tensor], bad: list[Tensor], family: Family) -> list[str]:
    """The cells for one defect of one family."""
    snr = signal_to_noise("flow") if family.flow else signal_to_noise("epsilon", stable_diffusion_alphas())
    energies = [
        patch_energy(one - other, 64 * one[0].numel(), 64 * one[0].numel())
        for one, other in zip(bad, sharp, strict=True)
    ]
    today = least_timestep(statistics.median(energies), snr, FreqLossConfig.image_quality_threshold)
    means, bad_means = (torch.stack([latents.mean(dim=(1, 2)) for latents in which]) for which in (sharp, bad))
    shift = float((bad_means - means).mean(dim=0).square().sum())
    variance = float((means - means.mean(dim=0)).square().sum(dim=1).mean())
    fitted = restoration.fit(sharp, bad)
    per_ring = restoration.frequencies_per_ring(*sharp[0].shape[-2:]).float()

    def total(covariances: Tensor) -> float:
        return float(covariances.diagonal(dim1=1, dim2=2).sum(dim=1) @ per_ring)

    moved = total(fitted.error_before) - shift * sharp[0][0].numel()
    floors = [
        restoration.least_timestep(error, fitted.sharp, snr, FRACTION) for error in (fitted.error_before, fitted.error)
    ]
    left = [total(fitted.error) / total(fitted.error_before), moved / total(fitted.error_before)]
    return [f"{today}", f"{shift:.2f} / {variance:.2f}", *(f"{value:.2f}" for value in left), *map(str, floors)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--autoencoders", type=Path, default=CACHE)
    parser.add_argument("--names", nargs="+", choices=tuple(FAMILIES), default=["taesd", "taesd3", "taef1"])
    parser.add_argument("--references", type=int, default=8)
    options = parser.parse_args()
    files = [file for path in options.photos for file in (of_folder(path) if path.is_dir() else [path])]
    images = [middle(file) for file in files[: options.references]]
    print(f"{len(images)} photographs, tiny autoencoders\n")
    heads = ("today", "shift / variance", "left, restored", "left, means moved", "5%, before", "5%, restored")
    print(f"| model | defect | {' | '.join(heads)} |\n{'|---' * (len(heads) + 2)}|")
    for name in options.names:
        encoder = load_encoder(name, options.autoencoders)
        sharp = encode(encoder, images)
        for title, defect in DEFECTS.items():
            bad = encode(encoder, [defect.apply(image) for image in images])
            print(f"| {FAMILIES[name].model} | {title} | {' | '.join(row(sharp, bad, FAMILIES[name]))} |", flush=True)


if __name__ == "__main__":
    main()
