"""Trains the toy model from scratch, on synthetic images alone: a latent diffusion model with SD1.5's topology.

    pip install "freq-loss-plugin[study]"
    python assets/train_tiny_sd.py vae --steps 4000      the autoencoder, on crops of 64 pixels
    python assets/train_tiny_sd.py unet --steps 4700     the UNet and the text encoder, on its latents
    python assets/train_tiny_sd.py clip --steps 1500     the image encoder, on images and captions
    python assets/train_tiny_sd.py evaluate              PSNR, and the attributes of samples for validation captions

The stages write the model to assets/tiny_sd, in diffusers layout and fp16. They save their state every 100 steps below
--work and continue from it; the learning rate falls to 0 over --steps, so choose that number once. A step depends on
its number alone (images, noise and timesteps are drawn from it), so an interrupted run ends where an uninterrupted one
does. On two CPU cores a step of the VAE took 0.3 s, one of the UNet 0.8 s; a GPU is used if there is one.

No stage sees the styles `frames` and `weave`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from make_tiny_sd.autoencoder import train_vae
from make_tiny_sd.evaluation import evaluate
from make_tiny_sd.image_encoder import train_clip
from make_tiny_sd.unet import train_unet

STAGES = {"vae": train_vae, "unet": train_unet, "clip": train_clip, "evaluate": evaluate}
STEPS = {"vae": 4000, "unet": 4700, "clip": 1500}


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--steps", type=int, help="default: 4000, 4700 and 1500")
    parser.add_argument("--start", type=Path, help="the stage unet begins with the weights of the model in this folder")
    parser.add_argument("--images", type=int, default=6000, help="training images of the stages unet and clip")
    parser.add_argument("--samples", type=int, default=128, help="validation images")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny_sd")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "freq_loss_plugin" / "tiny_sd")
    options = parser.parse_args()
    options.steps = options.steps or STEPS.get(options.stage)
    options.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    STAGES[options.stage](options, device)


if __name__ == "__main__":
    main()
