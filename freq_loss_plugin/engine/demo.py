"""The demo: a run on the toy model that ships with the package, and on synthetic images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..guidance_token.extract import Clip, extract
from ..guidance_token.features import is_current
from ..image_folders import find_images
from ..toy_model import model_folder
from ..toy_model.scenes import STYLES, Scene, draw, random_scene
from .comparison import Sampling
from .dataset import Example

TRAINED_STYLES = STYLES[1:]
IMAGES, HELD_OUT, PROMPTS = 24, 12, 6
# Random streams of scenes; the toy model was trained on neither, nor on these styles.
_TRAINING, _HELD_OUT = 11, 12
# The TOML of the demo. dist_match is far above the loss's own default of 0.003, which has no visible effect in so short
# a run; the learning rate suits a model of 1/250 of the size of SD1.5.
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
    """The demo, ready to train.

    Attributes:
        values: the keys and values of its TOML.
        held_out: images of the same style that are not trained on.
        sampling: prompts for samples: the captions of validation images.
    """

    values: dict[str, Any]
    held_out: list[Example]
    sampling: Sampling

    def extract_features(self) -> None:
        """Write the features of all images, by the toy model's image encoder, for a guidance token."""
        clip = Clip(str(model_folder() / "image_encoder"), torch.device("cpu"))
        folders = Path(self.values["train_data_dir"]), self.held_out[0].file.parent.parent
        images = [image for folder in folders for image in find_images(train_data_dir=str(folder))]
        extract([image for image in images if not is_current(image, clip.identity)], clip, batch_size=8)


def prepare(output: Path, style: str) -> Demo:
    """Draw the images of a style below ``output``, in kohya's layout, with captions.

    Args:
        output: the folder in which ``images/`` is made.
        style: one of `TRAINED_STYLES`.

    Raises:
        ConfigError: the toy model is missing.
    """
    model = model_folder()
    folder = output / "images"
    _write(folder / style / f"1_{style}", style, _TRAINING, IMAGES)
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
