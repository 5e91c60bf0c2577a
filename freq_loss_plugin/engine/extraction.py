"""``python -m freq_loss_plugin extract-features``: CLIP features of training pictures, for the guidance token."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import toml
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, CLIPImageProcessor, CLIPVisionModelWithProjection

from .. import guidance
from ..options import ConfigError, flatten
from ..picture_folders import SOURCES, pictures
from .lora_file import write_whole

DEFAULT_CLIP = "openai/clip-vit-large-patch14"
DESCRIPTION = f"""\
Writes the CLIP features of each training picture beside it (cat.png.clip.safetensors), for guidance_token.

The pictures are those of --train_data_dir and --reg_data_dir (folders like 10_mycat), of a --dataset_config, or of a
kohya TOML (--config_file) that names one of these. Pictures whose features are up to date are passed over, so an
interrupted run goes on where it stopped. The default CLIP, {DEFAULT_CLIP}, is downloaded once; its
projection is 768 wide, as the text encoder of SD1.x is.
"""


class Clip:
    """A CLIP vision model with its projection, as a function of pictures.

    Args:
        name: a folder or an id of the Hub.
        device: where it runs.

    Raises:
        ConfigError: it cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        try:
            config = AutoConfig.from_pretrained(name)
            if hasattr(config, "vision_config"):  # a whole CLIP, whose own number is the one that counts
                config, width = config.vision_config, config.projection_dim
                config.projection_dim = width
            # In float32 whatever the file holds; how to ask for that while loading differs between versions.
            self._model = CLIPVisionModelWithProjection.from_pretrained(name, config=config).to(device).float().eval()
            self._processor = CLIPImageProcessor.from_pretrained(name)
        except (OSError, ValueError, RuntimeError, AttributeError) as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"--clip {name}: {first}. Expected a folder or the name of a CLIP vision model with projection in the "
                f"layout of transformers, for instance {DEFAULT_CLIP}"
            ) from None
        self._device = device
        # The same weights under another name or in another folder are the same CLIP, and other weights are another.
        weight = self._model.visual_projection.weight.detach().float().cpu().numpy().tobytes()
        self.identity = f"{Path(name).name}@{hashlib.sha256(weight).hexdigest()[:12]}"

    @property
    def width(self) -> int:
        """How many values the features have."""
        return int(self._model.config.projection_dim)

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> Tensor:
        """``get_image_features`` of CLIP: projected, not normalised; shape (B, d), float32."""
        pixels = self._processor(images=images, return_tensors="pt")["pixel_values"].to(self._device)
        return self._model(pixel_values=pixels).image_embeds.float().cpu()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``extract-features``."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for source in SOURCES:
        parser.add_argument(f"--{source}", metavar="PATH", help="as in sd-scripts")
    parser.add_argument("--config_file", type=Path, metavar="TOML", help="a kohya TOML that names the pictures")
    parser.add_argument("--clip", default=DEFAULT_CLIP, metavar="PATH_OR_ID", help=f"default: {DEFAULT_CLIP}")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu, mps, ...")


def run(options: argparse.Namespace) -> int:
    """Extract as the command line says; returns the exit status: 1 where pictures could not be read.

    Raises:
        ConfigError: something of it cannot be used.
    """
    if options.batch_size < 1:
        raise ConfigError(f"--batch_size {options.batch_size}: expected a whole number >= 1")
    found = pictures(**_sources(options))
    clip = Clip(options.clip, _device(options.device))
    waiting = [picture for picture in found if not guidance.is_current(picture, clip.identity)]
    current = len(found) - len(waiting)
    print(f"{len(found)} pictures, {current} of them up to date; CLIP {clip.identity}, {clip.width} wide")
    broken = extract(waiting, clip, options.batch_size)
    if broken:
        print(f"{len(broken)} pictures cannot be read; repair or remove them and run this again:")
        print("\n".join(f"  {picture}: {reason}" for picture, reason in broken.items()))
        return 1
    return 0


def extract(waiting: list[Path], clip: Clip, batch_size: int) -> dict[Path, str]:
    """Write the features of pictures, each file whole or not at all; returns those that cannot be read, and why."""
    broken: dict[Path, str] = {}
    with tqdm(total=len(waiting), unit="picture", disable=not waiting) as bar:
        for batch in _batches(waiting, batch_size):
            images: dict[Path, Image.Image] = {}
            for picture in batch:
                try:
                    images[picture] = _read(picture)
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                    broken[picture] = str(error) or type(error).__name__
            if images:
                for picture, features in zip(images, clip(list(images.values())), strict=True):
                    _save(picture, features, clip)
            bar.update(len(batch))
    return broken


def _save(picture: Path, features: Tensor, clip: Clip) -> None:
    tensors, metadata = guidance.contents(picture, features, clip.identity)

    def write(part: Path) -> None:
        save_file(tensors, part, metadata)

    write_whole(guidance.feature_file(picture), write)


def _read(picture: Path) -> Image.Image:
    """As the trainers see it: RGB, without an alpha channel, and not turned by its EXIF."""
    with Image.open(picture) as opened:
        return opened.convert("RGB")


def _batches(items: list[Path], size: int) -> Iterator[list[Path]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _sources(options: argparse.Namespace) -> dict[str, Any]:
    given = {source: getattr(options, source) for source in SOURCES}
    if options.config_file is None:
        return given
    try:
        written = flatten(toml.load(options.config_file))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config_file {options.config_file} cannot be read: {error}") from None
    return {source: given[source] or written.get(source) for source in SOURCES}


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}; expected cuda, cpu or mps") from None
    return device
