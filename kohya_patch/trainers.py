"""What is known about the trainers of sd-scripts: which there are, how each predicts, and which one is running.

What is assumed of the code of sd-scripts itself is in `kohya_patch.host`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeGuard

from freq_loss_plugin.loss.latents import NUM_TRAIN_TIMESTEPS, PredictionType

from .host import DATASET_GROUPS, TrainerKind
from .protocols import Trainer


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


@dataclass(frozen=True)
class TrainingRun:
    """A run in progress: the trainer, the arguments it was started with, and its data sets."""

    trainer: Trainer
    args: argparse.Namespace
    batch_sizes: tuple[int, ...] = ()
    datasets: tuple[Any, ...] = ()
    validation_datasets: tuple[Any, ...] = ()

    @property
    def family(self) -> Family:
        """The entry of `FAMILIES` that is nearest to the trainer's class."""
        return next(FAMILIES[cls.__name__] for cls in type(self.trainer).__mro__ if cls.__name__ in FAMILIES)


def find_run() -> TrainingRun | None:
    """The run that calls this function, or None.

    sd-scripts hands a network module neither its trainer nor its arguments, but it calls it from
    ``trainer.train(args)``, and that call is on the stack.
    """
    for frame in _callers():
        if frame.f_code.co_name != "train":
            continue
        trainer, args = frame.f_locals.get("self"), frame.f_locals.get("args")
        if isinstance(args, argparse.Namespace) and _is_network_trainer(trainer):
            groups = [frame.f_locals.get(name) for name in DATASET_GROUPS]
            trained, validated = (getattr(group, "datasets", []) for group in groups)
            sizes = tuple(dataset.batch_size for dataset in trained if hasattr(dataset, "batch_size"))
            return TrainingRun(trainer, args, sizes, tuple(trained), tuple(validated))
    return None


def first_step(args: argparse.Namespace) -> int:
    """How many optimizer steps a resumed run has behind it, as sd-scripts counts them."""
    if getattr(args, "initial_step", None):
        return int(args.initial_step)
    folder = getattr(args, "resume", None)
    state = Path(folder or "") / "train_state.json"
    if not folder or not state.exists():
        return 0
    return int(json.loads(state.read_text(encoding="utf-8"))["current_step"])


def is_main_process() -> bool:
    """Whether this is the process that logs and saves."""
    from accelerate import PartialState  # noqa: PLC0415 - install.py reads this module without accelerate

    return PartialState().is_main_process


def process_index() -> int:
    """The number of this process."""
    from accelerate import PartialState  # noqa: PLC0415

    return PartialState().process_index


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_network_trainer(trainer: Any) -> TypeGuard[Trainer]:
    return any(cls.__name__ in FAMILIES for cls in type(trainer).__mro__)
