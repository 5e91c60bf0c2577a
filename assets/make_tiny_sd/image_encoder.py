"""The stage clip: a CLIP, trained contrastively on images and captions, of which the image encoder is kept."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from freq_loss_plugin.toy_model.scenes import CAPTIONED_VALUES, SIZE, draw

from .architecture import make_clip
from .images import TRAINING, VALIDATION, draw_all, random_scenes
from .stage import Stage
from .tokenizer import load_or_make_tokenizer, token_ids

BATCH = 128


def train_clip(options: argparse.Namespace, device: torch.device) -> None:
    """CLIP's training (Radford et al. 2021) from scratch; writes the image encoder to ``options.output``."""
    tokenizer = load_or_make_tokenizer(options.work / "tokenizer")
    torch.manual_seed(2)
    clip = make_clip(tokenizer).to(device)
    stage = Stage(options.work / "clip.pt", {"clip": clip}, options.steps, rate=4e-3, decay=0.995)
    scenes = random_scenes((TRAINING, 0, 6), options.images)
    # 8 bits, because 6,000 images in float32 would take more than a gigabyte.
    images = torch.stack([torch.from_numpy((draw(scene) * 255).round().astype(np.uint8)) for scene in scenes])
    captions = [scene.caption() for scene in scenes]
    batch = min(BATCH, len(captions))

    def loss_of_step(step: int) -> dict[str, Tensor]:
        chosen = np.random.default_rng((TRAINING, step, 7)).choice(len(captions), size=batch, replace=False)
        pixels = images[chosen].to(device).permute(0, 3, 1, 2) / 127.5 - 1
        ids = token_ids(tokenizer, [captions[i] for i in chosen], device)
        return {"contrastive": clip(input_ids=ids, pixel_values=pixels, return_loss=True).loss}

    stage.run(loss_of_step)
    clip.eval()
    print_zero_shot(clip, tokenizer, device, options.samples)
    save_image_encoder(clip, options.output / "image_encoder")


@torch.no_grad()
def print_zero_shot(clip: CLIPModel, tokenizer: CLIPTokenizer, device: torch.device, count: int) -> None:
    """Zero-shot accuracy by attribute: captions that differ in it alone, compared with a validation image."""
    scenes = random_scenes((VALIDATION, 8), count)
    pixels = draw_all(scenes).to(device)
    for name, values in CAPTIONED_VALUES.items():
        right = 0
        for scene, image in zip(scenes, pixels, strict=True):
            captions = [replace(scene, **{name: value}).caption() for value in values]
            ids = token_ids(tokenizer, captions, device)
            similarity = clip(input_ids=ids, pixel_values=image[None]).logits_per_image
            right += values[int(similarity.argmax())] == getattr(scene, name)
        print(f"{name:<12} {right / count:.1%} of {count} images (chance {1 / len(values):.0%})")


def save_image_encoder(clip: CLIPModel, folder: Path) -> None:
    """Write the vision half of a CLIP with its projection, in fp16, and its preprocessing."""
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(clip.config.vision_config.to_dict()))
    names = encoder.state_dict()
    encoder.load_state_dict({name: weights for name, weights in clip.state_dict().items() if name in names})
    encoder.half().save_pretrained(folder, safe_serialization=True)
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=SIZE, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)
