"""The command line of ``inspect``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import image_files, image_folders
from ..atomic_files import write_whole
from ..image_quality.detectability import least_timestep, signal_to_noise, stable_diffusion_alphas
from ..image_quality.measurement import Measurement, as_pixels
from ..image_quality.survey import defect_energies, measure_all, pick_references
from ..options.config import FreqLossConfig
from ..options.fields import ConfigError
from ..toy_model import model_folder
from ..version import __version__
from . import page
from .findings import Finding, advice, make_findings, summary, table

DESCRIPTION = """\
Shows what is wrong with training images: effective resolution (of enlarged or blurred ones), JPEG quality, noise, and
the least timestep at which each should train. Writes nothing, unless --json, --html or --plot names a file.
"""
# Where no resolution is given, images are measured at their own size, but no larger than this.
_LARGEST = 1024
_REFERENCE_SIDE = 256  # for a stand-in it need not be more, and a VAE is slow on a CPU
_STAND_IN = (
    "Least timesteps are those by the VAE of the toy model, a stand-in; a run finds them with its own VAE (see "
    "docs/image-quality.md)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``inspect``."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    image_folders.add_arguments(parser)
    parser.add_argument("--resolution", metavar="PIXELS", help="of the training, as in sd-scripts: 1024, or 1024,768")
    for name, what in (("json", "everything as JSON"), ("html", "a page with thumbnails"), ("plot", "a plot, as PNG")):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write {what}")


def run(options: argparse.Namespace) -> int:
    """Inspect the images that the command line names; returns the exit status, 1 if some could not be read.

    Raises:
        ConfigError: an argument cannot be used, or there are no images.
    """
    config = image_folders.read_config(options)
    images = _find(config)
    area = _area(options.resolution or config.get("resolution"))
    sizes = {image: _trained_size(image, area) for image in images}
    found = measure_all(sizes)
    measured = {image: one for image, one in found.items() if isinstance(one, Measurement)}
    least, remark = _least_timesteps(measured)
    findings = make_findings(found, least)
    words = [summary(findings), *advice(findings), remark]
    print("\n".join(["", table(findings), "", *filter(None, words)]))
    _write(options, findings, [word for word in words if word])
    return 1 if len(measured) < len(found) else 0


def _find(config: Mapping[str, Any]) -> list[Path]:
    """The images of a run, or those directly in a folder."""
    folder = Path(config.get("train_data_dir") or "")
    direct = config.get("train_data_dir") and folder.is_dir() and not config.get("dataset_config")
    if direct and not config.get("in_json") and image_folders.of_folder(folder):
        return image_folders.of_folder(folder)
    return image_folders.find_images(**image_folders.sources(config))


def _area(resolution: Any) -> int | None:
    if resolution is None:
        return None
    parts = resolution if isinstance(resolution, (list, tuple)) else str(resolution).split(",")
    try:
        sides = [int(part) for part in parts]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 64:
        raise ConfigError(f'resolution = {resolution!r}: expected a side like 1024, or "width,height", of at least 64')
    return sides[0] * sides[-1]


def _trained_size(image: Path, area: int | None) -> tuple[int, int] | None:
    """The size at which sd-scripts would train an image in buckets, before it crops it; None for its own."""
    try:
        with Image.open(image) as opened:
            width, height = opened.size
    except image_files.UNREADABLE:
        return None  # measuring it says why
    scale = math.sqrt((area or _LARGEST**2) / (width * height))
    scale = scale if area else min(scale, 1.0)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _least_timesteps(found: Mapping[Path, Measurement]) -> tuple[dict[Path, tuple[int, int]] | None, str]:
    """The least timesteps of images with a defect, for SD and for flow matching, and what to say of them."""
    defects = {image: one.defect for image, one in found.items() if one.defect}
    if not defects:
        return {}, ""
    if importlib.util.find_spec("diffusers") is None:
        return None, "Least timesteps need diffusers: pip install 'freq-loss-plugin[train]'"
    sizes = {image: one.trained for image, one in found.items()}
    references = pick_references(found, sizes)
    if not references:
        return None, ""
    energies = defect_energies(set(defects.values()), references, sizes, _toy_encoder(), _REFERENCE_SIDE)
    schedules = signal_to_noise("epsilon", stable_diffusion_alphas()), signal_to_noise("flow")
    threshold = FreqLossConfig.image_quality_threshold
    least = {
        image: (
            least_timestep(energies[defect], schedules[0], threshold),
            least_timestep(energies[defect], schedules[1], threshold),
        )
        for image, defect in defects.items()
    }
    return least, _STAND_IN


def _toy_encoder() -> Any:
    from diffusers import AutoencoderKL  # noqa: PLC0415 - what is measured needs none

    vae = AutoencoderKL.from_pretrained(model_folder(), subfolder="vae")

    @torch.no_grad()
    def encode(image: Image.Image) -> Tensor:
        return vae.encode(as_pixels(image)[None] * 2 - 1).latent_dist.mean * vae.config.scaling_factor

    return encode


def _write(options: argparse.Namespace, findings: list[Finding], words: list[str]) -> None:
    contents = {
        "version": __version__,
        "summary": words[0],
        "images": [finding.as_json() for finding in findings],
    }
    text = json.dumps(contents, indent=1, ensure_ascii=False)
    if options.json:
        write_whole(options.json, lambda part: part.write_text(text, encoding="utf-8"))
    if options.html:
        write_whole(options.html, lambda part: part.write_text(page.render(findings, words), encoding="utf-8"))
    if options.plot:
        image = page.plot(findings)
        write_whole(options.plot, lambda part: image.save(part, "PNG"))
    for file in filter(None, (options.json, options.html, options.plot)):
        print(f"wrote {file}")
