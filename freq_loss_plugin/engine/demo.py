"""The embedded default: a training on the shipped model and on pictures that are drawn on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..embedded import model_folder
from ..embedded.pictures import STYLES, Scene, draw, random_scene
from ..guidance import is_current
from ..picture_folders import pictures
from .comparison import Sampling
from .dataset import Example
from .extraction import Clip, extract

TRAINED_STYLES = STYLES[1:]
PICTURES, HELD_OUT, PROMPTS = 24, 12, 6
# Streams of scenes; the base model has seen neither, and neither of the styles.
_TRAINING, _HELD_OUT = 11, 12
# What stands in the TOML of the embedded default. dist_match is far above the loss's own default of 0.003, which would
# not be seen in so short a training; the learning rate suits a model that is a 250th of SD1.5.
SETTINGS: dict[str, Any] = {
    "resolution": "128",
    "caption_extension": ".txt",
    "network_alpha": 4.0,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "max_train_steps": 200,
    "output_name": "tiny_lora",
    "dist_match": 0.05,
}


@dataclass(frozen=True)
class Demo:
    """The embedded default, ready to train.

    Attributes:
        values: as read from a TOML.
        held_out: pictures of the same style that are not trained on.
        sampling: prompts for them.
    """

    values: dict[str, Any]
    held_out: list[Example]
    sampling: Sampling

    def extract_features(self) -> None:
        """Write the features of all pictures, by the embedded image encoder, for a guidance token."""
        clip = Clip(str(model_folder() / "image_encoder"), torch.device("cpu"))
        folders = Path(self.values["train_data_dir"]), self.held_out[0].file.parent.parent
        drawn = [picture for folder in folders for picture in pictures(train_data_dir=str(folder))]
        extract([picture for picture in drawn if not is_current(picture, clip.identity)], clip, batch_size=8)


def prepare(output: Path, style: str) -> Demo:
    """Draw the pictures of a style below ``output``, in kohya's layout, with captions.

    Args:
        output: where ``pictures/`` goes.
        style: one of `TRAINED_STYLES`.

    Raises:
        ConfigError: the embedded model is not there.
    """
    model = model_folder()
    folder = output / "pictures"
    _write(folder / style / f"1_{style}", style, _TRAINING, PICTURES)
    scenes = _write(folder / f"{style}_held_out" / f"1_{style}", style, _HELD_OUT, HELD_OUT)
    paths = sorted((folder / f"{style}_held_out" / f"1_{style}").glob("*.png"))
    held_out = [Example(path, scene.caption(style), 1, (128, 128)) for path, scene in zip(paths, scenes, strict=True)]
    values = SETTINGS | {
        "pretrained_model_name_or_path": str(model),
        "train_data_dir": str(folder / style),
        "output_dir": str(output),
    }
    return Demo(values, held_out, Sampling([example.caption for example in held_out[:PROMPTS]], guidance=3.0))


def _write(folder: Path, style: str, stream: int, count: int) -> list[Scene]:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng((stream, STYLES.index(style)))
    scenes = [random_scene(generator) for _ in range(count)]
    for number, scene in enumerate(scenes):
        pixels = (draw(scene, style) * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(scene.caption(style), encoding="utf-8")
    return scenes
