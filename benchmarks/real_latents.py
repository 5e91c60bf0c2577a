"""What defects of photographs do to the latents of real models, and what a filter can take back.

    python benchmarks/real_latents.py PHOTOS... [--autoencoders FOLDER] [--names taesd taesd3 taef1] [--publish]

PHOTOS are sharp images or folders of them, of which the first eight are taken (as many as a run takes), 512 pixels
from the middle of each. The autoencoders are tiny ones, distilled from those of SD1.5 (taesd), SDXL (taesdxl), SD3
(taesd3), FLUX.1 (taef1) and FLUX.2 (taef2): files like ``taef1_encoder.safetensors``, as ComfyUI users have them in
``models/vae_approx``, in FOLDER, in the folder that FREQ_LOSS_AUTOENCODERS names, or in the cache folder of this
project's tests. Their latents are close to the real ones, not the same.

For each defect the table has

- the common shift of the channel means, its squared norm, and the variance of these means between photographs;
- the fraction of the squared error that is left after restoring (`freq_loss_plugin.image_quality.restoration`), by
  photographs that were left out of the fit, and the fraction left by moving the means alone;
- the least timestep at which the error that remains biases a denoiser by at most a fraction of its own error (5%), for
  the noise schedule of the model, before and after restoring.

``--publish`` writes what ``inspect`` and the node show, freq_loss_plugin/image_quality/published.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from freq_loss_plugin.image_files import open_rgb
from freq_loss_plugin.image_folders import of_folder
from freq_loss_plugin.image_quality import published, restoration
from freq_loss_plugin.image_quality.pixels import as_pixels
from freq_loss_plugin.inspection.autoencoder import tiny_encoder

CACHE = Path(os.environ.get("FREQ_LOSS_AUTOENCODERS", Path.home() / ".cache" / "freq_loss_plugin" / "autoencoders"))
SIDE, PHOTOS = 512, 8
FRACTION = 0.05


class Family(NamedTuple):
    """The model whose latents a tiny autoencoder has, by its name in `published.MODELS`."""

    key: str

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.model.channels

    @property
    def model(self) -> published.Model:
        """Its title and schedule."""
        return published.MODELS[self.key]

    @property
    def flow(self) -> bool:
        """Whether it predicts a velocity."""
        return self.model.prediction_type == "flow"


FAMILIES = {
    "taesd": Family("sd15"),
    "taesdxl": Family("sdxl"),
    "taesd3": Family("sd3"),
    "taef1": Family("flux1"),
    "taef2": Family("flux2"),
}


class Effect(NamedTuple):
    """What a defect does: see the head of this file; ``floors`` has one of each of `published.FRACTIONS`."""

    shift: float
    variance: float
    left: float
    left_by_means: float
    floor_before: int
    floor: int
    floors: Sequence[int]


def load_encoder(name: str, folder: Path) -> nn.Module:
    """An encoder, a function of images (B, 3, H, W) in -1..1.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    file, other = (folder / f"{name}_encoder.{ending}" for ending in ("safetensors", "pth"))
    if file.is_file():
        return tiny_encoder(load_file(file))
    if other.is_file():
        return tiny_encoder(torch.load(other, weights_only=True))
    raise FileNotFoundError(f"no {file}; ComfyUI users have it in models/vae_approx: give --autoencoders FOLDER")


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


def effect(sharp: list[Tensor], bad: list[Tensor], snr: Tensor) -> Effect:
    """What a defect does to the latents of photographs, and what remains after restoring."""
    fitted = restoration.fit(sharp, bad)
    means, bad_means = (torch.stack([latents.mean(dim=(1, 2)) for latents in which]) for which in (sharp, bad))
    shift = float((bad_means - means).mean(dim=0).square().sum())
    variance = float((means - means.mean(dim=0)).square().sum(dim=1).mean())
    change = mean(float((one - other).square().sum()) for one, other in zip(bad, sharp, strict=True))
    moved = 1 - shift * sharp[0][0].numel() / change
    before = restoration.least_timestep(fitted.error_before, fitted.sharp, snr, FRACTION, fitted.counts)
    floors = [fitted.least_timestep(snr, fraction) for fraction in published.FRACTIONS]
    return Effect(shift, variance, 1 - fitted.restored, moved, before, fitted.least_timestep(snr, FRACTION), floors)


def effects(family: Family, encoder: nn.Module, images: Sequence[Image.Image]) -> Iterator[tuple[str, float, Effect]]:
    """Kind, level and effect of each defect, for each kind the mildest first; a worse one has no lower floor."""
    sharp = encode(encoder, images)
    for kind, levels in published.LEVELS.items():
        highest = [0] * len(published.FRACTIONS)
        for level in levels:
            bad = encode(encoder, [published.defect_of(kind, level).apply(image) for image in images])
            found = effect(sharp, bad, family.model.snr)
            highest = list(map(max, highest, found.floors))
            yield kind, level, found._replace(floors=highest)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--autoencoders", type=Path, default=CACHE)
    parser.add_argument("--names", nargs="+", choices=tuple(FAMILIES), default=tuple(FAMILIES))
    parser.add_argument("--publish", action="store_true")
    options = parser.parse_args()
    if options.publish and set(options.names) != set(FAMILIES):
        parser.error("--publish needs all autoencoders: leave --names out")
    files = [file for path in options.photos for file in (of_folder(path) if path.is_dir() else [path])]
    images = [middle(file) for file in files[:PHOTOS]]
    print(f"{len(images)} photographs, tiny autoencoders\n")
    heads = ("shift / variance", "left, restored", "left, means moved", "5%, before", "5%, restored")
    print(f"| model | defect | {' | '.join(heads)} |\n{'|---' * (len(heads) + 2)}|")
    rows = []
    for name in options.names:
        family = FAMILIES[name]
        for kind, level, found in effects(family, load_encoder(name, options.autoencoders), images):
            cells = [f"{found.shift:.2f} / {found.variance:.2f}", f"{found.left:.2f}", f"{found.left_by_means:.2f}"]
            cells += [f"{found.floor_before}", f"{found.floor}"]
            title = str(published.defect_of(kind, level))
            print(f"| {family.model.title} | {title} | {' | '.join(cells)} |", flush=True)
            restored = min(max(1 - found.left, 0), 1)
            rows.append((family.key, kind, f"{level:.4g}", f"{restored:.3f}", *found.floors))
    if options.publish:
        with published.FILE.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([published.COLUMNS, *rows])
        print(f"\nwrote {published.FILE}")


if __name__ == "__main__":
    main()
