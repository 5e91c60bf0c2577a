"""The stage evaluate: how well the autoencoder reconstructs, and whether samples show what their captions say."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from more_itertools import chunked
from PIL import Image

from freq_loss_plugin.toy_model.attributes import measure
from freq_loss_plugin.toy_model.scenes import CAPTIONED_VALUES, SIZE, ImageArray, Scene, draw, random_scene

from .architecture import load_pipeline
from .autoencoder import reconstruction_psnr
from .images import VALIDATION


def evaluate(options: argparse.Namespace, device: torch.device) -> None:
    """Print PSNR and the attributes of samples for validation captions; draw a sheet of samples."""
    pipeline = load_pipeline(options.output, device)
    print(f"validation PSNR {reconstruction_psnr(pipeline.vae, device):.2f} dB")
    pipeline.set_progress_bar_config(disable=True)
    generator = np.random.default_rng((VALIDATION, 5))
    scenes = [random_scene(generator) for _ in range(options.samples)]
    samples: list[ImageArray] = []
    for batch in chunked(scenes, 16):
        samples += list(
            pipeline(
                [scene.caption() for scene in batch],
                height=SIZE,
                width=SIZE,
                num_inference_steps=30,
                guidance_scale=3.0,
                generator=torch.Generator().manual_seed(int(generator.integers(2**31))),
                output_type="np",
            ).images
        )
    measured = [measure(image) for image in samples]
    for name, values in CAPTIONED_VALUES.items():
        right = sum(words[name] == getattr(scene, name) for words, scene in zip(measured, scenes, strict=True))
        print(f"{name:<12} {right / len(scenes):.1%} of {len(scenes)} samples (chance {1 / len(values):.0%})")
    write_sheet(scenes[:16], samples[:16], options.output / "samples.png")


def write_sheet(scenes: list[Scene], samples: list[ImageArray], file: Path) -> None:
    """Rows of up to eight drawn images, each above a row of what the model sampled for their captions."""
    rows = []
    for some_scenes, some_samples in zip(chunked(scenes, 8), chunked(samples, 8), strict=True):
        rows += [[draw(scene) for scene in some_scenes], some_samples]
    sheet = np.ones((SIZE * len(rows), SIZE * max(map(len, rows)), 3))
    for number, row in enumerate(rows):
        strip = np.concatenate(row, axis=1)
        sheet[number * SIZE : (number + 1) * SIZE, : strip.shape[1]] = strip
    Image.fromarray((sheet * 255).round().astype(np.uint8)).save(file, optimize=True)
