"""What is known about the trainers of sd-scripts: which there are, how each predicts, and how to ask for one timestep.

Everything that depends on a trainer's class or on the spelling of its arguments is in this file.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

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
        draws: the module of sd-scripts in which it draws its timesteps.
        guidance: whether the guidance token is defined for it: one CLIP text encoder, whose last token is replaced.
    """

    name: str
    network_module: str
    prediction: Literal["scheduler", "flow", "sample"]
    timestep_scale: float = 1.0
    draws: str = "library.train_util"
    guidance: bool = False

    def prediction_type(self, args: argparse.Namespace) -> PredictionType:
        """What ``get_noise_pred_and_target`` of this trainer returns."""
        if self.prediction == "scheduler":
            return "v_prediction" if getattr(args, "v_parameterization", False) else "epsilon"
        return self.prediction


_FLUX = "library.flux_train_utils"

# Keyed by class name, because SD1/2 is trained by a class of `__main__`.
FAMILIES: dict[str, Family] = {
    "NetworkTrainer": Family("SD1.x / SD2.x", "networks.lora", "scheduler", guidance=True),
    "SdxlNetworkTrainer": Family("SDXL", "networks.lora", "scheduler"),
    "Sd3NetworkTrainer": Family("SD3", "networks.lora_sd3", "sample", draws="library.sd3_train_utils"),
    "FluxNetworkTrainer": Family("FLUX / Chroma", "networks.lora_flux", "flow", draws=_FLUX),
    # Lumina predicts x0 - n, the negative of the others; the loss is a square.
    "LuminaNetworkTrainer": Family("Lumina Image", "networks.lora_lumina", "flow", draws="library.lumina_train_util"),
    "HunyuanImageNetworkTrainer": Family("Hunyuan Image", "networks.lora_hunyuan_image", "flow", draws=_FLUX),
    "AnimaNetworkTrainer": Family("Anima", "networks.lora_anima", "flow", NUM_TRAIN_TIMESTEPS, _FLUX),
}

# Methods that the hook replaces on the running trainer, with the parameters that it reads. Nothing else is relied on.
NEEDED: dict[str, tuple[str, ...]] = {
    "process_batch": ("batch", "noise_scheduler", "accelerator", "args", "is_train"),
    "get_noise_pred_and_target": ("args", "latents", "text_encoder_conds", "is_train"),
    "all_reduce_network": (),
    "generate_step_logs": (),
    "update_metadata": ("metadata", "args"),
}
# What the guidance token needs beyond that.
NEEDED_FOR_GUIDANCE: dict[str, tuple[str, ...]] = {
    "get_noise_pred_and_target": ("batch",),
    "sample_images": ("accelerator", "unet"),
}


# And freq_loss_validation.
NEEDED_FOR_VALIDATION: dict[str, tuple[str, ...]] = {"accelerator_logging": ("accelerator", "logs", "step_value")}


@dataclass(frozen=True)
class Training:
    """A training that is under way: the trainer, the arguments it was started with, and its data sets.

    ``validates`` is whether some of these are for validation.
    """

    trainer: Any
    args: argparse.Namespace
    batch_sizes: tuple[int, ...] = ()
    datasets: tuple[Any, ...] = ()
    validates: bool = False

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
            return Training(trainer, args, sizes, (*trained, *validated), validates=bool(validated))
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
    _fix_sigma(fixed, sigma / (1 - sigma))
    fixed.model_prediction_type = "raw"
    return fixed


def timestep_drawer(
    family: Family, args: argparse.Namespace, noise_scheduler: Any, latents: Tensor
) -> Callable[[int], Tensor]:
    """How the trainer would draw timesteps for such latents: n of them, on the CPU, on the scale 0..1000.

    Its own function is called, with empty latents of one channel, since that also makes noisy latents.

    Raises:
        UnsupportedTrainerError: it is not there, or asks for something unknown.
    """
    module, host = importlib.import_module(family.draws), torch.device("cpu")
    if family.prediction == "scheduler":
        function = _drawing_function(module, "get_timesteps")
        first = 0 if args.min_timestep is None else args.min_timestep
        end = noise_scheduler.config.num_train_timesteps if args.max_timestep is None else args.max_timestep
        return lambda count: function(first, end, count, host)
    function = _drawing_function(module, "get_noisy_model_input_and_timesteps")
    parameters = inspect.signature(function).parameters

    def draw(count: int) -> Tensor:
        empty = torch.zeros(count, 1, *latents.shape[2:])
        known = {"args": args, "noise_scheduler": noise_scheduler, "latents": empty, "noise": empty}
        known |= {"device": host, "dtype": torch.float32}
        timesteps: Tensor = function(**{name: known[name] for name in parameters})[1]
        return timesteps

    return draw


@contextmanager
def at_timesteps(
    family: Family, args: argparse.Namespace, timesteps: Tensor, device: torch.device
) -> Iterator[argparse.Namespace]:
    """Arguments with which the trainer, as long as this lasts, gives its samples these timesteps, shape (B,).

    - SD1/2 and SDXL call ``get_timesteps`` of their module, which is another one meanwhile.
    - SD3 and the flow trainers calculate with their arguments, which may be tensors as well (see `at_one_timestep`).
    """
    if family.prediction == "scheduler":
        module = importlib.import_module(family.draws)
        original = module.get_timesteps

        def given(first: int, end: int, count: int, where: torch.device) -> Tensor:
            original(first, end, count, where)  # so that what is drawn after it stays the same
            return timesteps.to(where, non_blocking=True)

        module.get_timesteps = given  # type: ignore[attr-defined]
        try:
            yield args
        finally:
            module.get_timesteps = original  # type: ignore[attr-defined]
        return
    fixed = copy.copy(args)
    if family.prediction == "sample":
        fixed.min_timestep = fixed.max_timestep = timesteps.long()
    else:
        sigma = (timesteps.float() / NUM_TRAIN_TIMESTEPS).clamp(max=1 - 1e-6)
        _fix_sigma(fixed, (sigma / (1 - sigma)).to(device, non_blocking=True))
    yield fixed


def _fix_sigma(args: argparse.Namespace, shift: Tensor | float) -> None:
    """Make the flow trainers use sigma = shift / (1 + shift)."""
    args.timestep_sampling = "shift"
    args.sigmoid_scale = 0.0
    args.discrete_flow_shift = shift


def _drawing_function(module: Any, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] | None = getattr(module, name, None)
    if function is None:
        raise UnsupportedTrainerError(
            f"freq_loss_timesteps = 'shared' draws timesteps by {name} of sd-scripts' {module.__name__}, and there is "
            "none of that name; this sd-scripts is newer or older than this plug-in knows. Set freq_loss_timesteps = "
            "'unified'"
        )
    return function


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


def is_main_process() -> bool:
    """Whether this is the process that talks and saves."""
    from accelerate import PartialState

    return PartialState().is_main_process


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
