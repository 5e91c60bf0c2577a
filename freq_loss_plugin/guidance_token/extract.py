"""``python -m freq_loss_plugin extract-features``: CLIP features of training images, for the guidance token."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, CLIPImageProcessor, CLIPVisionModelWithProjection

from .. import image_files, image_folders
from ..atomic_files import write_whole
from ..options.fields import ConfigError
from . import features as guidance

DEFAULT_CLIP = "openai/clip-vit-large-patch14"
DESCRIPTION = f"""\
Writes the CLIP features of each training image beside it (cat.png.clip.safetensors), for guidance_token.

The images are those of --train_data_dir and --reg_data_dir (folders like 10_mycat), of a --dataset_config, or of a
kohya TOML (--config_file) that names one of these. Images whose features are up to date are skipped, so an interrupted
run continues where it stopped. The default CLIP, {DEFAULT_CLIP}, is downloaded once; its projection
is as wide as the text encoder of SD1.x, 768.
"""


class Clip:
    """A CLIP vision model with its projection, as a function of images.

    Args:
        name: a folder, or a model on the Hugging Face Hub.
        device: the device it runs on.

    Attributes:
        identity: name and hash of the weights.

    Raises:
        ConfigError: it cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        try:
            config = AutoConfig.from_pretrained(name)
            if hasattr(config, "vision_config"):  # a complete CLIP: its own projection_dim is the right one
                config, width = config.vision_config, config.projection_dim
                config.projection_dim = width
            # float32 whatever the file holds; the argument for that differs between versions.
            self._model = CLIPVisionModelWithProjection.from_pretrained(name, config=config).to(device).float().eval()
            self._processor = CLIPImageProcessor.from_pretrained(name)
        except (OSError, ValueError, RuntimeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"--clip {name}: {reason}. Expected a folder or the name of a CLIP vision model with projection in the "
                f"layout of transformers, for instance {DEFAULT_CLIP}"
            ) from None
        self._device = device
        # The hash tells models of the same name apart.
        weight = self._model.visual_projection.weight.detach().float().cpu().numpy().tobytes()
        self.identity = f"{Path(name).name}@{hashlib.sha256(weight).hexdigest()[:12]}"

    @property
    def width(self) -> int:
        """The width of the features."""
        return int(self._model.config.projection_dim)

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> Tensor:
        """``get_image_features`` of CLIP: projected, not normalized; shape (B, d), float32."""
        pixels = self._processor(images=images, return_tensors="pt")["pixel_values"].to(self._device)
        return self._model(pixel_values=pixels).image_embeds.float().cpu()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``extract-features``."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    image_folders.add_arguments(parser)
    parser.add_argument("--clip", default=DEFAULT_CLIP, metavar="PATH_OR_ID", help=f"default: {DEFAULT_CLIP}")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu, mps, ...")


def run(options: argparse.Namespace) -> int:
    """Extract features as the command line says; returns the exit status, 1 if images could not be read.

    Raises:
        ConfigError: an argument cannot be used, or there are no images.
    """
    if options.batch_size < 1:
        raise ConfigError(f"--batch_size {options.batch_size}: expected a whole number >= 1")
    found = image_folders.find(**image_folders.sources(image_folders.read_config(options)))
    images = found.images
    clip = Clip(options.clip, _device(options.device))
    outdated = [image for image in images if not guidance.is_current(image, clip.identity)]
    current = len(images) - len(outdated)
    print(f"{len(images)} images, {current} of them up to date; CLIP {clip.identity}, {clip.width} wide")
    for warning in found.warnings:
        print(f"warning: {warning}")
    unreadable = extract(outdated, clip, options.batch_size)
    if unreadable:
        print(f"{len(unreadable)} images cannot be read; repair or remove them and run this again:")
        print("\n".join(f"  {image}: {reason}" for image, reason in unreadable.items()))
        if hint := image_files.missing_package(unreadable):
            print(hint.removeprefix("; "))
        return 1
    return 0


def extract(files: list[Path], clip: Clip, batch_size: int) -> dict[Path, str]:
    """Write the features of images, each file atomically, and print what the user should know of the images.

    Args:
        files: the images.
        clip: computes the features.
        batch_size: images per batch.

    Returns:
        The images that cannot be read, and why.
    """
    unreadable: dict[Path, str] = {}
    noted: list[tuple[str, Path]] = []
    with tqdm(total=len(files), unit="image", disable=not files) as bar:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            images: dict[Path, Image.Image] = {}
            for file in batch:
                try:
                    with Image.open(file) as opened:
                        images[file] = image_files.as_rgb(opened)
                        noted += [(f"images, {note}", file) for note in image_files.notes(opened)]
                except image_files.UNREADABLE as error:
                    unreadable[file] = image_files.why_unreadable(file, error)
            if images:
                for file, features in zip(images, clip(list(images.values())), strict=True):
                    _save(file, features, clip)
            bar.update(len(batch))
    for note in image_folders.in_words(noted):
        print(f"warning: {note}")
    return unreadable


def _save(image: Path, features: Tensor, clip: Clip) -> None:
    tensors, metadata = guidance.contents(image, features, clip.identity)
    file = guidance.feature_file(image)
    try:
        write_whole(file, lambda part: save_file(tensors, part, metadata))
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be written: {error}. Features lie beside their images, where trainers look for them: make "
            "the folder writable, or copy the images to one that is"
        ) from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}; expected cuda, cpu or mps") from None
    return device
