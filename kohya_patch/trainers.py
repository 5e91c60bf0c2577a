"""What is known about the trainers of sd-scripts: which there are, how each predicts, and how to ask for one timestep.

Everything that depends on a trainer's class or on the spelling of its arguments is in this file.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from freq_loss_plugin.latents import NUM_TRAIN_TIMESTEPS, PredictionType

WORKING_VERSIONS = (
    "sd-scripts' main branch from 2025-03-30 (commit d0b5c0e5) on, and v0.10 or newer where tagged; "
    "v0.9.1 and older have no hook for losses"
)


class UnsupportedTrainerError(RuntimeError):
    """This sd-scripts, or this trainer, lacks what the hook needs; says what was looked for and what was found."""


@dataclass(frozen=True)
class Family:
    """What one trainer class trains.

    Attributes:
        name: for people.
        network_module: the LoRA module of sd-scripts that belongs to it.
        prediction: ``"scheduler"``: epsilon or v_prediction over a DDPM schedule; ``"flow"``: velocity; ``"sample"``:
            the trainer itself turns the prediction into a clean latent.
        timestep_scale: what multiplies the timesteps it returns to reach 0..1000.
        guidance: whether the guidance token is defined for it: one CLIP text encoder, whose last token is replaced.
    """

    name: str
    network_module: str
    prediction: Literal["scheduler", "flow", "sample"]
    timestep_scale: float = 1.0
    guidance: bool = False

    def prediction_type(self, args: argparse.Namespace) -> PredictionType:
        """What ``get_noise_pred_and_target`` of this trainer returns."""
        if self.prediction == "scheduler":
            return "v_prediction" if getattr(args, "v_parameterization", False) else "epsilon"
        return self.prediction


# Keyed by class name, because SD1/2 is trained by a class of `__main__`.
FAMILIES: dict[str, Family] = {
    "NetworkTrainer": Family("SD1.x / SD2.x", "networks.lora", "scheduler", guidance=True),
    "SdxlNetworkTrainer": Family("SDXL", "networks.lora", "scheduler"),
    "Sd3NetworkTrainer": Family("SD3", "networks.lora_sd3", "sample"),
    "FluxNetworkTrainer": Family("FLUX / Chroma", "networks.lora_flux", "flow"),
    # Lumina predicts x0 - n, the negative of the others; the loss is a square.
    "LuminaNetworkTrainer": Family("Lumina Image", "networks.lora_lumina", "flow"),
    "HunyuanImageNetworkTrainer": Family("Hunyuan Image", "networks.lora_hunyuan_image", "flow"),
    "AnimaNetworkTrainer": Family("Anima", "networks.lora_anima", "flow", timestep_scale=NUM_TRAIN_TIMESTEPS),
}

# Methods that the hook replaces on the running trainer, with the parameters that it reads. Nothing else is relied on.
NEEDED: dict[str, tuple[str, ...]] = {
    "process_batch": ("batch", "noise_scheduler", "accelerator", "args", "is_train"),
    "get_noise_pred_and_target": ("args", "latents", "is_train"),
    "all_reduce_network": (),
    "generate_step_logs": (),
    "update_metadata": ("metadata", "args"),
}
# What the guidance token needs beyond that.
NEEDED_FOR_GUIDANCE: dict[str, tuple[str, ...]] = {
    "get_noise_pred_and_target": ("batch", "text_encoder_conds"),
    "sample_images": ("accelerator", "unet"),
}


@dataclass(frozen=True)
class Training:
    """A training that is under way: the trainer, the arguments it was started with, and its data sets."""

    trainer: Any
    args: argparse.Namespace
    batch_sizes: tuple[int, ...] = ()
    datasets: tuple[Any, ...] = ()

    @property
    def family(self) -> Family:
        """The entry of `FAMILIES` that is nearest to the trainer's class."""
        return next(FAMILIES[cls.__name__] for cls in type(self.trainer).__mro__ if cls.__name__ in FAMILIES)


def find_training() -> Training | None:
    """The training on whose behalf this function is called, or None.

    sd-scripts hands a network module neither its trainer nor its arguments, but it calls it from
    ``trainer.train(args)``, and that call is on the stack.
    """
    for frame in _callers():
        if frame.f_code.co_name != "train":
            continue
        trainer, args = frame.f_locals.get("self"), frame.f_locals.get("args")
        if isinstance(args, argparse.Namespace) and _is_network_trainer(trainer):
            groups = [frame.f_locals.get(name) for name in ("train_dataset_group", "val_dataset_group")]
            trained, validated = (getattr(group, "datasets", []) for group in groups)
            sizes = tuple(dataset.batch_size for dataset in trained if hasattr(dataset, "batch_size"))
            return Training(trainer, args, sizes, (*trained, *validated))
    return None


def check_trainer(trainer: Any, needed: dict[str, tuple[str, ...]] = NEEDED) -> None:
    """Raise unless ``trainer`` has every method in ``needed``, with the parameters named there.

    Raises:
        UnsupportedTrainerError: says which method or parameter is missing.
    """
    for name, parameters in needed.items():
        method = getattr(trainer, name, None)
        if method is None:
            raise _unsupported(trainer, f"the method {name}", "none of that name")
        found = inspect.signature(method).parameters
        missing = [parameter for parameter in parameters if parameter not in found]
        if missing:
            raise _unsupported(
                trainer,
                f"the parameter{'s' * (len(missing) > 1)} {', '.join(missing)} of {name}",
                f"{name}({', '.join(found)})",
            )


def at_one_timestep(args: argparse.Namespace, timestep: int) -> argparse.Namespace:
    """A copy of ``args`` with which every trainer gives each sample of the batch the same timestep.

    - SD1/2, SDXL and SD3 draw from ``min_timestep``..``max_timestep``; sd-scripts' own validation sets both alike.
    - The flow trainers draw sigma. With ``timestep_sampling = "shift"`` it is x·shift / (1 + (shift - 1)·x) where
      x = sigmoid(sigmoid_scale·normal). A sigmoid_scale of 0 makes x = 1/2 and sigma = shift / (1 + shift), so that
      shift = s / (1 - s) gives sigma = s.
    - They also reshape the prediction by ``model_prediction_type``; ``raw`` leaves the velocity as it is.
    """
    fixed = copy.copy(args)
    fixed.min_timestep = fixed.max_timestep = timestep
    sigma = timestep / NUM_TRAIN_TIMESTEPS
    fixed.timestep_sampling = "shift"
    fixed.sigmoid_scale = 0.0
    fixed.discrete_flow_shift = sigma / (1 - sigma)
    fixed.model_prediction_type = "raw"
    return fixed


def first_step(args: argparse.Namespace) -> int:
    """How many optimizer steps a resumed training has behind it, as sd-scripts counts them."""
    import json
    import os

    if getattr(args, "initial_step", None):
        return int(args.initial_step)
    state = os.path.join(getattr(args, "resume", None) or "", "train_state.json")
    if not getattr(args, "resume", None) or not os.path.exists(state):
        return 0
    with open(state, encoding="utf-8") as file:
        return int(json.load(file)["current_step"])


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_network_trainer(trainer: Any) -> bool:
    return any(cls.__name__ in FAMILIES for cls in type(trainer).__mro__)


def _unsupported(trainer: Any, looked_for: str, found: str) -> UnsupportedTrainerError:
    file = inspect.getsourcefile(type(trainer)) or "an unknown file"
    return UnsupportedTrainerError(
        f"this sd-scripts cannot be used with kohya_patch: looked for {looked_for} in {type(trainer).__name__} "
        f"({file}), and found {found}. Works with {WORKING_VERSIONS}. Update sd-scripts (git pull), or train without "
        'the frequency loss by setting network_module back to "networks.lora"'
    )
