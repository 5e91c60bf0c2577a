"""The command line of ``inspect``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from .. import image_files, image_folders
from ..atomic_files import write_whole
from ..image_quality.measurement import Measurement, Size
from ..image_quality.measuring import measure_all
from ..image_quality.published import DEFAULT_MODEL, MODELS, lookup
from ..image_quality.sizes import read_buckets
from ..image_quality.survey import GRANULARITY, Encode, fit_defects, floors_of, pick_references
from ..image_quality.trained_image import TrainedImage
from ..options.config import FreqLossConfig
from ..options.fields import ConfigError
from ..version import __version__
from . import page
from .findings import Finding, advice, make_findings, summary, table

DESCRIPTION = """\
Shows what is wrong with training images: effective resolution (of enlarged or blurred ones), JPEG quality and noise,
and what freq_loss_image_quality = "auto" does with them: how far it restores their latents, and the least timestep at
which each then trains. Writes nothing beside them; --json, --html and --plot name files.
"""
# Where no resolution is given, images are measured at their own size, but no larger than this.
_LARGEST = 1024
_SIZES = ("resolution", "enable_bucket", "bucket_no_upscale")
_THRESHOLD = "freq_loss_image_quality_threshold"
_NO_REFERENCE = (
    "--vae: no image is sharp and has sides of 64 pixels or more, so there is nothing to make the defects on. "
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``inspect``."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    image_folders.add_arguments(parser)
    parser.add_argument("--resolution", metavar="PIXELS", help="of the training, as in sd-scripts: 1024, or 1024,768")
    for name in ("enable_bucket", "bucket_no_upscale"):
        parser.add_argument(f"--{name}", action="store_true", default=None, help="as in sd-scripts")
    parser.add_argument(
        "--model",
        choices=tuple(MODELS),
        default=DEFAULT_MODEL,
        help="whose latents and timesteps to show (%(default)s); flux1 also for Chroma, Lumina 2 and Z-Image",
    )
    parser.add_argument(
        "--vae",
        type=Path,
        metavar="PATH",
        help="exact numbers, by this VAE and your own sharp images: a folder of diffusers, or a *_encoder.safetensors",
    )
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
    threshold = FreqLossConfig(image_quality_threshold=config.get(_THRESHOLD, FreqLossConfig.image_quality_threshold))
    restoring, remarks = _restoring(measured, options, threshold.image_quality_threshold)
    findings = make_findings(found, restoring)
    words = [summary(findings), *advice(findings), *remarks, *found_images.warnings]
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


def _restoring(
    found: Mapping[Path, Measurement], options: argparse.Namespace, fraction: float
) -> tuple[dict[Path, tuple[float, int]], list[str]]:
    """The restored fraction and the least timestep of each image with a defect, and what to say of them."""
    defects = {image: one.defect for image, one in found.items() if one.defect}
    model = MODELS[options.model]
    if not defects:
        return {}, []
    references = pick_references({TrainedImage(image, one.trained): one for image, one in found.items()})
    if options.vae and references:
        fitted = fit_defects(set(defects.values()), references, _encoder(options))
        floors = floors_of(fitted, model.snr, fraction)
        by_defect = {defect: (fitted[defect].restored, floors[defect]) for defect in fitted}
        how = f"found with {options.vae} and {len(references)} of your sharp images"
    else:
        by_defect = {defect: lookup(options.model, defect, fraction) for defect in set(defects.values())}
        how = "from a table that was made with photographs; a run finds its own with its VAE and your sharp images"
    remark = f"What is restored, and t, are those of {model.title} (--model chooses others), {how}."
    nothing = [_NO_REFERENCE + "The table's numbers follow."] if options.vae and not references else []
    return {image: by_defect[defect] for image, defect in defects.items()}, [*nothing, remark]


def _encoder(options: argparse.Namespace) -> Encode:
    if importlib.util.find_spec("diffusers") is None:
        raise ConfigError("--vae needs diffusers: pip install 'freq-loss-plugin[train]'; or leave --vae out")
    from .autoencoder import load_encoder  # noqa: PLC0415 - without --vae nothing needs diffusers, slow to import

    encode = load_encoder(options.vae)
    channels = len(encode(Image.new("RGB", (GRANULARITY, GRANULARITY))))
    if channels != MODELS[options.model].channels:
        fitting = [f"--model {name}" for name, model in MODELS.items() if model.channels == channels]
        raise ConfigError(
            f"--vae {options.vae} has latents of {channels} channels, and those of --model {options.model} have "
            f"{MODELS[options.model].channels}; expected {' or '.join(fitting) or 'a VAE of one of the models'}"
        )
    return encode


def _write(options: argparse.Namespace, findings: list[Finding], words: list[str]) -> None:
    contents = {
        "version": __version__,
        "model": options.model,
        "vae": str(options.vae) if options.vae else None,
        "summary": words[0],
        "remarks": words[1:],
        "images": [finding.as_json() for finding in findings],
    }
    if options.json:
        _write_text(options.json, json.dumps(contents, indent=1, ensure_ascii=False))
    if options.html:
        _write_text(options.html, page.render(findings, words))
    if options.plot:
        image = page.plot(findings, MODELS[options.model].title)
        write_whole(options.plot, lambda part: image.save(part, "PNG"))
    for file in filter(None, (options.json, options.html, options.plot)):
        print(f"wrote {file}")


def _write_text(file: Path, text: str) -> None:
    """In UTF-8; bytes of a file name that are no text become escapes, which JSON reads as those bytes."""
    write_whole(file, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))
