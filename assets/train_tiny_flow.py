"""Trains the flow-matching toy model from scratch on drawn emoji: a miniature of SD3, for studies of flow matching.

    pip install "freq-loss-plugin[study]"                   and npm, which fetches the emoji
    python assets/train_tiny_flow.py vae --steps 2500       the autoencoder
    python assets/train_tiny_flow.py flow --steps 6000     the transformer and the text encoder
    python assets/train_tiny_flow.py evaluate               PSNR, and a sheet of samples

The stages write the model to --output in fp16, by default assets/tiny_flow. They save their state every 100 steps below
--work and continue from it; the learning rate falls to 0 over --steps, so choose that number once. A GPU is used if
there is one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from make_tiny_flow import emoji
from make_tiny_flow.model import FOLDER
from make_tiny_flow.training import evaluate, train_flow, train_vae

STAGES = {"vae": train_vae, "flow": train_flow, "evaluate": evaluate}
STEPS = {"vae": 2500, "flow": 6000}


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--steps", type=int, help="default: 2500 and 6000")
    parser.add_argument("--emoji", type=Path, default=emoji.DEFAULT_FOLDER, help="where the packages are unpacked")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "freq_loss_plugin" / "tiny_flow")
    options = parser.parse_args()
    options.steps = options.steps or STEPS.get(options.stage)
    options.work.mkdir(parents=True, exist_ok=True)
    STAGES[options.stage](options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
