"""The demo: a run on the toy model that ships with the package, on synthetic images of which most are bad.

As in many a data set, a few images are sharp and alike, and the varied ones are enlarged, blurred, compressed or noisy.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..guidance_token.extract import Clip, extract
from ..guidance_token.features import is_current
from ..image_folders import find_images
from ..image_quality.defects import Defect
from ..toy_model import model_folder
from ..toy_model.scenes import STYLES, Scene, draw, random_scene
from .comparison import Sampling
from .dataset import Example

TRAINED_STYLES = STYLES[1:]
IMAGES, HELD_OUT, PROMPTS = 24, 12, 6
# Random streams of scenes; the toy model was trained on neither, nor on these styles.
_TRAINING, _HELD_OUT = 11, 12
# One image in four is sharp; all of these show the same. The others have these defects in turn.
_SHARP_EVERY = 4
_DEFECTS = {
    "enlarged_8_times": Defect(resolution=1 / 8),
    "jpeg_quality_10": Defect(jpeg=10),
    "noisy": Defect(noise=20),
    "enlarged_4_times": Defect(resolution=1 / 4),
    "blurred": Defect(resolution=0.19),
}
# The TOML of the demo: an arm of the study of imperfect images (benchmarks/what_helps), its rank, batches and length.
# The learning rate was best there, for plain MSE as well; it suits a model of 1/250 of the size of SD1.5.
SETTINGS: dict[str, Any] = {
    "resolution": "128",
    "caption_extension": ".txt",
    "train_batch_size": 4,
    "network_dim": 16,
    "network_alpha": 16.0,
    "learning_rate": 8e-3,
    "lr_scheduler": "cosine",
    "max_train_steps": 120,
    "output_name": "tiny_lora",
    "dist_match": 0.0,
    "freq_loss_balance": "band",
    "freq_loss_image_quality": "auto",
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
    _write_training_images(folder / style / f"1_{style}", style)
    held_out = folder / f"{style}_held_out" / f"1_{style}"
    scenes = _scenes(_HELD_OUT, style, HELD_OUT)
    examples = []
    for number, scene in enumerate(scenes):
        file = _write(held_out / f"{number:02}.png", _drawn(scene, style), scene.caption(style))
        examples.append(Example(file, scene.caption(style), 1, (128, 128)))
    values = SETTINGS | {
        "pretrained_model_name_or_path": str(model),
        "train_data_dir": str(folder / style),
        "output_dir": str(output),
    }
    return Demo(values, examples, Sampling([example.caption for example in examples[:PROMPTS]], guidance=3.0))


def _write_training_images(folder: Path, style: str) -> None:
    defects = itertools.cycle(_DEFECTS.items())
    for number, scene in enumerate(_scenes(_TRAINING, style, IMAGES)):
        if number % _SHARP_EVERY == 0:
            shown = replace(scene, shape="circle", color="red", position="in the centre", background="white")
            _write(folder / f"{number:02}_sharp.png", _drawn(shown, style), shown.caption(style))
        else:
            name, defect = next(defects)
            _write(folder / f"{number:02}_{name}.png", defect.apply(_drawn(scene, style), number), scene.caption(style))


def _scenes(stream: int, style: str, count: int) -> list[Scene]:
    generator = np.random.default_rng((stream, STYLES.index(style)))
    return [random_scene(generator) for _ in range(count)]


def _drawn(scene: Scene, style: str) -> Image.Image:
    return Image.fromarray((draw(scene, style) * 255).round().astype(np.uint8))


def _write(file: Path, image: Image.Image, caption: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    file.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return file
