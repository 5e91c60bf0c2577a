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
from ..image_quality.measurement import Measurement, Size
from ..image_quality.measuring import measure_all
from ..image_quality.pixels import as_pixels
from ..image_quality.sizes import read_buckets
from ..image_quality.survey import defect_energies, pick_references
from ..image_quality.trained_image import TrainedImage
from ..options.config import FreqLossConfig
from ..toy_model import model_folder
from ..version import __version__
from . import page
from .findings import Finding, advice, make_findings, summary, table

DESCRIPTION = """\
Shows what is wrong with training images: effective resolution (of enlarged or blurred ones), JPEG quality, noise, and
the least timestep at which each should train. Writes nothing beside them; --json, --html and --plot name files.
"""
# Where no resolution is given, images are measured at their own size, but no larger than this.
_LARGEST = 1024
_SIZES = ("resolution", "enable_bucket", "bucket_no_upscale")
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
    for name in ("enable_bucket", "bucket_no_upscale"):
        parser.add_argument(f"--{name}", action="store_true", default=None, help="as in sd-scripts")
    for name, what in (("json", "everything as JSON"), ("html", "a page with thumbnails"), ("plot", "a plot, as PNG")):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write {what}")


def run(options: argparse.Namespace) -> int:
    """Inspect the images that the command line names; returns the exit status, 1 if some could not be read.

    Raises:
        ConfigError: an argument cannot be used, or there are no images.
    """
    config = image_folders.read_config(options)
    found_images = image_folders.find(**image_folders.sources(config), or_directly=True)
    given = {key: value for key in _SIZES if (value := getattr(options, key)) is not None}
    images = [TrainedImage(image, _trained_size(image, config | given, found_images)) for image in found_images.images]
    found = {image.file: one for image, one in measure_all(images).items()}
    measured = {image: one for image, one in found.items() if isinstance(one, Measurement)}
    least, remark = _least_timesteps(measured)
    findings = make_findings(found, least)
    words = [summary(findings), *advice(findings), remark, *found_images.warnings]
    words = [word for word in words if word]
    print("\n".join(["", table(findings), "", *words]))
    _write(options, findings, words)
    return 1 if len(measured) < len(found) else 0


def _trained_size(image: Path, config: Mapping[str, Any], found: image_folders.Found) -> Size | None:
    """(width, height) to which a run resizes an image, the largest of several; None if that is not known."""
    try:
        with Image.open(image) as opened:
            size = opened.size
    except image_files.UNREADABLE:
        return None  # measuring it says why
    datasets = [
        read_buckets(each, "musubi-tuner") if image_folders.is_musubi(each) else read_buckets({**config, **each})
        for each in found.datasets.get(image, [{}])
    ]
    sizes = [buckets.resized(size) for buckets in datasets if buckets is not None]
    scale = min(1.0, _LARGEST / math.sqrt(size[0] * size[1]))
    return max(sizes, default=(max(1, round(size[0] * scale)), max(1, round(size[1] * scale))))


def _least_timesteps(found: Mapping[Path, Measurement]) -> tuple[dict[Path, tuple[int, int]] | None, str]:
    """The least timesteps of images with a defect, for SD and for flow matching, and what to say of them."""
    defects = {image: one.defect for image, one in found.items() if one.defect}
    if not defects:
        return {}, ""
    if importlib.util.find_spec("diffusers") is None:
        return None, "Least timesteps need diffusers: pip install 'freq-loss-plugin[train]'"
    references = pick_references({TrainedImage(image, one.trained): one for image, one in found.items()})
    if not references:
        return None, ""
    energies = defect_energies(set(defects.values()), references, _toy_encoder(), _REFERENCE_SIDE)
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
        "remarks": words[1:],
        "images": [finding.as_json() for finding in findings],
    }
    if options.json:
        _write_text(options.json, json.dumps(contents, indent=1, ensure_ascii=False))
    if options.html:
        _write_text(options.html, page.render(findings, words))
    if options.plot:
        image = page.plot(findings)
        write_whole(options.plot, lambda part: image.save(part, "PNG"))
    for file in filter(None, (options.json, options.html, options.plot)):
        print(f"wrote {file}")


def _write_text(file: Path, text: str) -> None:
    """In UTF-8; bytes of a file name that are no text become escapes, which JSON reads as those bytes."""
    write_whole(file, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))
