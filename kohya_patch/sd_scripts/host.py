"""Everything that is assumed of sd-scripts, in one place, and how an installed version is checked against it.

`network.check` asks for what the chosen options need before any model is loaded; ``install.py`` asks for all of it
(`host_check`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from ..host import CalledFunction, Host, find_call, lookup

SD_SCRIPTS = Host(
    "sd-scripts",
    "Tested with the main branch from 2025-03-30 (commit d0b5c0e5) to v0.11.1, and with the dev branch at 37a1cbb; "
    "v0.9.1 and older have no hook for losses",
    ("networks.lora", "networks.lora_flux"),
)

# Local variables of ``train``.
DATASET_GROUPS = ("train_dataset_group", "val_dataset_group")

# Methods that the hook replaces on the running trainer, or relies on, with the parameters that it reads.
METHODS: Mapping[str, tuple[str, ...]] = {
    "process_batch": ("batch", "noise_scheduler", "accelerator", "args", "is_train"),
    "get_noise_pred_and_target": ("args", "latents", "text_encoder_conds", "is_train"),
    "all_reduce_network": (),
    "generate_step_logs": (),
    "update_metadata": ("metadata", "args"),
    "train": ("args",),
}
# What single options need beyond that.
GUIDANCE_METHODS: Mapping[str, tuple[str, ...]] = {
    "get_noise_pred_and_target": ("batch",),
    "sample_images": ("accelerator", "unet"),
}
BALANCE_METHODS: Mapping[str, tuple[str, ...]] = {"post_process_loss": ("loss",)}
VALIDATION_METHODS: Mapping[str, tuple[str, ...]] = {"accelerator_logging": ("accelerator", "logs", "step_value")}
QUALITY_METHODS: Mapping[str, tuple[str, ...]] = {
    "encode_images_to_latents": ("args", "vae", "images"),
    "shift_scale_latents": ("args", "latents"),
}

# What makes the images of a batch known: attributes of a data set, names that its ``__getitem__`` uses with them, and
# the parameters of the class that describes an image.
DATASET = "DreamBoothDataset"
DATASET_ATTRIBUTES = ("image_data", "buckets_indices", "bucket_manager")
BATCH_NAMES = ("buckets", "bucket_index", "bucket_batch_size", "batch_index")
IMAGE = "ImageInfo"
IMAGE_PARAMETERS = ("absolute_path", "num_repeats", "is_reg")

# Network modules that work with some trainers only, by the names of these in `trainers.FAMILIES`.
NETWORK_MODULES: Mapping[str, tuple[str, ...]] = {
    "networks.loha": ("SdxlNetworkTrainer", "AnimaNetworkTrainer"),
    "networks.lokr": ("SdxlNetworkTrainer", "AnimaNetworkTrainer"),
}

MASKED_LOSS = "apply_masked_loss"  # of (loss, batch)

# The parameter with which the flow trainers shift single samples' timesteps (``timestep_sampling.offset`` of a subset),
# and the values of ``timestep_sampling`` that heed it: sigma = warp(sigmoid(sigmoid_scale * (normal + offset))).
OFFSET = "timestep_sampling_offset"
OFFSET_SAMPLINGS = ("sigmoid", "shift", "flux_shift")

TrainerKind = Literal["scheduler", "flow", "sample"]


class Drawing(NamedTuple):
    """How trainers of one kind draw timesteps.

    Attributes:
        calls: functions, each called by the one before, the first by ``get_noise_pred_and_target``; the last one draws.
        parameters: what the last one may have; all of these can be supplied.
        options: training arguments by which these functions can be made to use one timestep.
    """

    calls: tuple[str, ...]
    parameters: tuple[str, ...]
    options: tuple[str, ...]


_NOISY = ("get_noisy_model_input_and_timesteps",)
_NOISY_PARAMETERS = ("args", "noise_scheduler", "latents", "noise", "device", "dtype", OFFSET)
DRAWING: Mapping[TrainerKind, Drawing] = {
    "scheduler": Drawing(
        ("get_noise_noisy_latents_and_timesteps", "get_timesteps"),
        ("min_timestep", "max_timestep", "b_size", "device"),
        ("min_timestep", "max_timestep"),
    ),
    "sample": Drawing(_NOISY, _NOISY_PARAMETERS, ("min_timestep", "max_timestep")),
    "flow": Drawing(_NOISY, _NOISY_PARAMETERS, ("timestep_sampling", "sigmoid_scale", "discrete_flow_shift")),
}


def drawing_function(trainer: type, kind: TrainerKind) -> CalledFunction:
    """The function by which a trainer draws its timesteps.

    Args:
        trainer: the trainer class.
        kind: what its kind of model predicts, a key of `DRAWING`.

    Raises:
        UnsupportedTrainerError: there is none, it has a parameter that cannot be supplied, or no training argument can
            make it use one timestep.
    """
    expected = DRAWING[kind]
    chain = ("get_noise_pred_and_target", *expected.calls)
    calls = list(filter(None, (find_call(trainer, *chain[: count + 1]) for count in range(1, len(chain)))))
    if len(calls) < len(expected.calls):
        found = " -> ".join(chain[: len(calls) + 1])
        raise SD_SCRIPTS.unsupported(trainer, f"the calls {' -> '.join(chain)} in {trainer.__name__}", f"only {found}")
    drawing = calls[-1]
    parameters = inspect.signature(drawing.function).parameters
    if not parameters.keys() <= set(expected.parameters):
        known = f"at most {', '.join(expected.parameters)} as the parameters of {drawing.name}"
        raise SD_SCRIPTS.unsupported(trainer, known, ", ".join(parameters))
    used = [name for call in calls for name in inspect.unwrap(call.function).__code__.co_names]
    SD_SCRIPTS.check_names(trainer, f"training arguments in {drawing.name}", expected.options, used)
    return drawing


def masked_loss(trainer: type) -> Callable[..., Any]:
    """sd-scripts' own function that masks a loss by the masks of a batch.

    Raises:
        UnsupportedTrainerError: ``process_batch`` calls none.
    """
    found = find_call(trainer, "process_batch", MASKED_LOSS)
    if found is None:
        raise SD_SCRIPTS.unsupported(trainer, f"a call of {MASKED_LOSS} in {trainer.__name__}.process_batch", "none")
    return found.function


def check_datasets(trainer: type) -> None:
    """Check that data sets know the images of a batch, and that a running trainer's data sets can be found.

    Raises:
        UnsupportedTrainerError: names what is missing.
    """
    train: Any = inspect.unwrap(trainer.train)  # type: ignore[attr-defined]
    code = train.__code__
    SD_SCRIPTS.check_names(trainer, "variables of train", DATASET_GROUPS, (*code.co_varnames, *code.co_cellvars))
    dataset = train.__globals__.get(DATASET)
    if dataset is None:
        raise SD_SCRIPTS.unsupported(trainer, f"the class {DATASET}", "none of that name")
    used = dataset.__getitem__.__code__.co_names
    SD_SCRIPTS.check_names(trainer, f"names in {DATASET}.__getitem__", (*DATASET_ATTRIBUTES, *BATCH_NAMES), used)
    image = lookup(dataset.__init__, IMAGE)
    parameters = inspect.signature(image.function).parameters if image else ()
    SD_SCRIPTS.check_names(trainer, f"parameters of {IMAGE}", IMAGE_PARAMETERS, parameters)


def check_everything(trainer: type, kind: TrainerKind, *, guidance: bool) -> None:
    """Check all that any option could need of a trainer class, for which guidance_token may be defined.

    Raises:
        UnsupportedTrainerError: names what is missing.
    """
    for methods in (METHODS, VALIDATION_METHODS, BALANCE_METHODS, QUALITY_METHODS):
        SD_SCRIPTS.check_methods(trainer, methods)
    drawing_function(trainer, kind)
    masked_loss(trainer)
    check_datasets(trainer)
    if guidance:
        SD_SCRIPTS.check_methods(trainer, GUIDANCE_METHODS)
