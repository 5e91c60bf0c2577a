"""What is known about the trainers of sd-scripts: which there are, how each predicts, and which one is running.

What is assumed of the code of sd-scripts itself is in `host`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from freq_loss_plugin.loss.latents import NUM_TRAIN_TIMESTEPS, PredictionType

from .. import runs
from .host import DATASET_GROUPS, TrainerKind


@dataclass(frozen=True)
class Family:
    """What one trainer class trains.

    Attributes:
        name: human-readable.
        network_module: the LoRA module of sd-scripts that belongs to it.
        kind: ``"scheduler"``: epsilon or v_prediction over a DDPM schedule; ``"flow"``: velocity; ``"sample"``:
            the trainer itself turns the prediction into a clean latent.
        timestep_scale: what multiplies the timesteps it returns to reach 0..1000.
        guidance: whether the guidance token is defined for it: one CLIP text encoder, whose last token is replaced.
    """

    name: str
    network_module: str
    kind: TrainerKind
    timestep_scale: float = 1.0
    guidance: bool = False

    def prediction_type(self, args: argparse.Namespace) -> PredictionType:
        """What ``get_noise_pred_and_target`` of this trainer returns."""
        if self.kind == "scheduler":
            return "v_prediction" if getattr(args, "v_parameterization", False) else "epsilon"
        return self.kind


# Keyed by class name, because SD1/2 is trained by a class of `__main__`.
FAMILIES: dict[str, Family] = {
    "NetworkTrainer": Family("SD1.x / SD2.x", "networks.lora", "scheduler", guidance=True),
    "SdxlNetworkTrainer": Family("SDXL", "networks.lora", "scheduler"),
    "Sd3NetworkTrainer": Family("SD3", "networks.lora_sd3", "sample"),
    "FluxNetworkTrainer": Family("FLUX / Chroma", "networks.lora_flux", "flow"),
    # Lumina predicts x0 - n, the negative of the others; the loss is a square.
    "LuminaNetworkTrainer": Family("Lumina Image", "networks.lora_lumina", "flow"),
    "HunyuanImageNetworkTrainer": Family("Hunyuan Image", "networks.lora_hunyuan_image", "flow"),
    "AnimaNetworkTrainer": Family("Anima", "networks.lora_anima", "flow", NUM_TRAIN_TIMESTEPS),
}


class TrainingRun(runs.TrainingRun[Family]):
    """A run of sd-scripts."""

    families = FAMILIES
    groups = DATASET_GROUPS


def first_step(args: argparse.Namespace) -> int:
    """How many optimizer steps a resumed run has behind it, as sd-scripts counts them."""
    if getattr(args, "initial_step", None):
        return int(args.initial_step)
    folder = getattr(args, "resume", None)
    state = Path(folder or "") / "train_state.json"
    if not folder or not state.exists():
        return 0
    return int(json.loads(state.read_text(encoding="utf-8"))["current_step"])
