"""Does a LoRA follow its guidance token? Two groups of different images with the same caption.

    python benchmarks/guidance_token.py [--steps 300] [--output output/guidance_token]

Trains one LoRA on the toy model with `guidance_token` and plain MSE, and samples three times from the same noise:
without features, with the mean features of group A, and with those of group B. The distance of a sample to a group is
the root mean square difference to the nearest of its images (pixels, 0..1); color, shape and texture are measured by
`freq_loss_plugin.toy_model.attributes`. Takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from freq_loss_plugin.engine import comparison, dataset, settings
from freq_loss_plugin.engine.outcome import Outcome
from freq_loss_plugin.engine.run import train as train_lora
from freq_loss_plugin.guidance_token.extract import Clip, extract
from freq_loss_plugin.image_folders import find_images
from freq_loss_plugin.toy_model import model_folder
from freq_loss_plugin.toy_model.attributes import measure
from freq_loss_plugin.toy_model.scenes import draw, random_scene

CAPTION = "an image"
# One background for both: with SD's noise schedule, samples take their brightness from the noise more than from words.
GROUPS: dict[str, dict[str, Any]] = {
    "A": {"color": "red", "shape": "circle", "texture": "checks", "background": "white"},
    "B": {"color": "blue", "shape": "square", "texture": "horizontal stripes", "background": "white"},
}
COMPARED = ("color", "shape", "texture")
PER_GROUP, SAMPLES = 12, 8


@dataclass(frozen=True)
class Samples:
    """Samples with one token.

    Attributes:
        images: shape (n, 3, H, W), 0..1.
        distance: to the nearest image of each group, a mean over the samples.
        agreement: the fraction of color, shape and texture that is that group's.
    """

    images: Tensor
    distance: dict[str, float]
    agreement: dict[str, float]


def draw_groups(folder: Path) -> None:
    """Twelve images of each group, at random positions and sizes, all with the same caption."""
    generator = np.random.default_rng(5)
    for name, fixed in GROUPS.items():
        (folder / f"1_{name}").mkdir(parents=True, exist_ok=True)
        for number in range(PER_GROUP):
            pixels = (draw(replace(random_scene(generator), **fixed)) * 255).round().astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"1_{name}" / f"{number:02}.png")
            (folder / f"1_{name}" / f"{number:02}.txt").write_text(CAPTION)


def train(output: Path, steps: int) -> Outcome:
    """Draw the images, extract their features, train the LoRA."""
    folder = output / "images"
    draw_groups(folder)
    clip = Clip(str(model_folder() / "image_encoder"), torch.device("cpu"))
    extract(find_images(train_data_dir=str(folder)), clip, 8)
    values = {
        "pretrained_model_name_or_path": str(model_folder()),
        "train_data_dir": str(folder),
        "caption_extension": ".txt",
        "resolution": "128",
        "train_batch_size": 8,
        "network_dim": 16,
        "network_alpha": 16.0,
        "network_train_unet_only": True,
        "learning_rate": 3e-3,
        "lr_scheduler": "cosine",
        "max_train_steps": steps,
        "output_dir": str(output),
        "output_name": "guided_lora",
        "dist_match": 0.0,
        "guidance_token": True,
    }
    return train_lora(*settings.read(values))


def sample(outcome: Outcome, features: Tensor | None) -> Samples:
    """Sample with these features in the last token, and compare with both groups."""
    assert outcome.features is not None
    by_image = outcome.features.by_image
    data = {
        name: torch.stack(
            [
                dataset.load_pixels(dataset.Example(image, CAPTION, 1, (128, 128))) / 2 + 0.5
                for image in by_image
                if image.parent.name == f"1_{name}"
            ]
        )
        for name in GROUPS
    }
    sampling = comparison.Sampling([CAPTION] * SAMPLES, guidance=3.0, features=features)
    made = comparison.sample(outcome.model, sampling, (128, 128))
    measured = [measure(image.permute(1, 2, 0).numpy()) for image in made]
    distance, agreement = {}, {}
    for name, fixed in GROUPS.items():
        to_each = (made[:, None] - data[name][None]).square().mean(dim=(2, 3, 4)).sqrt()
        distance[name] = to_each.min(dim=1).values.mean().item()
        agreement[name] = float(np.mean([words[key] == fixed[key] for words in measured for key in COMPARED]))
    return Samples(made, distance, agreement)


def mean_features(outcome: Outcome, group: str) -> Tensor:
    """The mean of one group's features, shape (1, d)."""
    assert outcome.features is not None
    of_group = [values for image, values in outcome.features.by_image.items() if image.parent.name == f"1_{group}"]
    return torch.stack(of_group).mean(dim=0, keepdim=True)


def run(output: Path, steps: int) -> dict[str, Samples]:
    """Train once; the samples by token: ``none``, ``A`` and ``B``."""
    outcome = train(output, steps)
    return {"none": sample(outcome, None)} | {name: sample(outcome, mean_features(outcome, name)) for name in GROUPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("output/guidance_token"))
    options = parser.parse_args()
    by_token = run(options.output, options.steps)
    print("\n| token | distance to A | distance to B | attributes of A | attributes of B |\n|---|---|---|---|---|")
    for name, samples in by_token.items():
        distances = " | ".join(f"{value:.3f}" for value in samples.distance.values())
        fractions = " | ".join(f"{value:.0%}" for value in samples.agreement.values())
        print(f"| {name if name == 'none' else f'features of {name}'} | {distances} | {fractions} |")
    rows = [torch.cat(list(samples.images), dim=-1) for samples in by_token.values()]
    sheet = (torch.cat(rows, dim=-2).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(sheet).save(options.output / "samples.png")
    print(f"rows none, A, B: {options.output / 'samples.png'}")


if __name__ == "__main__":
    main()
