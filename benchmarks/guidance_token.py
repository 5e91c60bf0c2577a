"""Does a LoRA follow its guidance token? Two groups of pictures that look different, under one caption.

    python benchmarks/guidance_token.py [--steps 300] [--output output/guidance_token]

Trains one LoRA on the embedded model with `guidance_token`, plain MSE, and samples with the same noise three times:
without features, with the mean of group A's, with the mean of group B's. For each sample the distance to a group is
the root mean square difference to the nearest of its pictures (pixels, 0..1); colour, shape and texture are read off by
`freq_loss_plugin.embedded.attributes`. Two cores need about three minutes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from freq_loss_plugin.embedded import model_folder
from freq_loss_plugin.embedded.attributes import measure
from freq_loss_plugin.embedded.pictures import draw, random_scene
from freq_loss_plugin.engine import comparison, dataset, settings, training
from freq_loss_plugin.engine.extraction import Clip, extract
from freq_loss_plugin.picture_folders import pictures

CAPTION = "a picture"
# One background for both: by SD's schedule a sampler takes brightness from the noise more than from words.
GROUPS = {
    "A": {"colour": "red", "shape": "circle", "texture": "checks", "background": "white"},
    "B": {"colour": "blue", "shape": "square", "texture": "horizontal stripes", "background": "white"},
}
TOLD_APART_BY = ("colour", "shape", "texture")
PER_GROUP, SAMPLES = 12, 8


@dataclass(frozen=True)
class Samples:
    """Samples with one kind of token.

    Attributes:
        pictures: shape (n, 3, H, W), 0..1.
        distance: to the nearest picture of each group, a mean over the samples.
        agreement: which share of colour, shape and texture is that group's.
    """

    pictures: Tensor
    distance: dict[str, float]
    agreement: dict[str, float]


def draw_groups(folder: Path) -> None:
    """Twelve pictures of each group, at random positions and sizes, all with the same caption."""
    generator = np.random.default_rng(5)
    for name, fixed in GROUPS.items():
        (folder / f"1_{name}").mkdir(parents=True, exist_ok=True)
        for number in range(PER_GROUP):
            pixels = (draw(replace(random_scene(generator), **fixed)) * 255).round().astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"1_{name}" / f"{number:02}.png")
            (folder / f"1_{name}" / f"{number:02}.txt").write_text(CAPTION)


def train(output: Path, steps: int) -> training.Outcome:
    """Draw, extract, train."""
    folder = output / "pictures"
    draw_groups(folder)
    extract(pictures(train_data_dir=str(folder)), Clip(str(model_folder() / "image_encoder"), torch.device("cpu")), 8)
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
    return training.train(*settings.read(values))


def sample(outcome: training.Outcome, features: Tensor | None) -> Samples:
    """Sample with these features in the last token, and compare with both groups."""
    by_picture = outcome.features.by_picture
    data = {
        name: torch.stack(
            [
                dataset.load_pixels(dataset.Example(picture, CAPTION, 1, (128, 128))) / 2 + 0.5
                for picture in by_picture
                if picture.parent.name == f"1_{name}"
            ]
        )
        for name in GROUPS
    }
    sampling = comparison.Sampling([CAPTION] * SAMPLES, guidance=3.0, features=features)
    made = comparison.sample(outcome.model, sampling, (128, 128))
    read = [measure(picture.permute(1, 2, 0).numpy()) for picture in made]
    distance, agreement = {}, {}
    for name, fixed in GROUPS.items():
        to_each = (made[:, None] - data[name][None]).square().mean(dim=(2, 3, 4)).sqrt()
        distance[name] = to_each.min(dim=1).values.mean().item()
        agreement[name] = float(np.mean([each[key] == fixed[key] for each in read for key in TOLD_APART_BY]))
    return Samples(made, distance, agreement)


def mean_features(outcome: training.Outcome, group: str) -> Tensor:
    """The mean of one group's features, shape (1, d)."""
    of_group = [
        values for picture, values in outcome.features.by_picture.items() if picture.parent.name == f"1_{group}"
    ]
    return torch.stack(of_group).mean(dim=0, keepdim=True)


def run(output: Path, steps: int) -> dict[str, Samples]:
    """One training, and its samples by token: ``none``, ``A`` and ``B``."""
    outcome = train(output, steps)
    return {"none": sample(outcome, None)} | {name: sample(outcome, mean_features(outcome, name)) for name in GROUPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("output/guidance_token"))
    options = parser.parse_args()
    found = run(options.output, options.steps)
    print("\n| token | distance to A | distance to B | attributes of A | attributes of B |\n|---|---|---|---|---|")
    for name, each in found.items():
        distances = " | ".join(f"{value:.3f}" for value in each.distance.values())
        shares = " | ".join(f"{value:.0%}" for value in each.agreement.values())
        print(f"| {name if name == 'none' else f'features of {name}'} | {distances} | {shares} |")
    rows = [torch.cat(list(each.pictures), dim=-1) for each in found.values()]
    sheet = (torch.cat(rows, dim=-2).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(sheet).save(options.output / "samples.png")
    print(f"rows none, A, B: {options.output / 'samples.png'}")


if __name__ == "__main__":
    main()
