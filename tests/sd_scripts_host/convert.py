"""Writes a model in diffusers layout as one safetensors file, with sd-scripts' own functions.

python convert.py SD_SCRIPTS MODEL FILE
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch


def main() -> None:
    sd_scripts, model, file = map(Path, sys.argv[1:])
    sys.path.insert(0, str(sd_scripts))
    from launch import narrow_unet

    narrow_unet(model / "unet" / "config.json")
    from library import model_util, train_util

    args = argparse.Namespace(pretrained_model_name_or_path=str(model), v2=False, vae=None)
    text_encoder, vae, unet, _ = train_util._load_target_model(args, torch.float32)
    metadata = {"format": "pt"}
    model_util.save_stable_diffusion_checkpoint(
        False, str(file), text_encoder, unet, None, 0, 0, metadata, torch.float32, vae
    )


if __name__ == "__main__":
    main()
