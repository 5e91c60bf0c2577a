"""Everything that is assumed of sd-scripts, in one place, and how an installed version is checked against it.

`kohya_patch.network.check` asks for what the chosen options need before any model is loaded; ``install.py`` asks for
all of it (`kohya_patch.host_check`). Both use the host's own classes. A function is looked up where its caller looks
it up: replacing it in a module that only re-exports it would have no effect.
"""

from __future__ import annotations

import dis
import inspect
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

WORKING_VERSIONS = (
    "Tested with the main branch from 2025-03-30 (commit d0b5c0e5) to v0.11.1, and with the dev branch at 37a1cbb; "
    "v0.9.1 and older have no hook for losses"
)

# The first thing that every trainer's ``train`` calls, with the training arguments; defined in one of sd-scripts'
# modules below this package. `kohya_patch.startup` wraps it there.
FIRST_CALL = "verify_training_args"
LIBRARY = "library"

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

# Network modules that work with some trainers only, by the names of these in `kohya_patch.trainers.FAMILIES`.
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


class UnsupportedTrainerError(RuntimeError):
    """This sd-scripts, or this trainer, lacks what the hook needs; says what was looked for and what was found."""


class CalledFunction(NamedTuple):
    """A function of sd-scripts at the place where its caller looks it up.

    Attributes:
        namespace: the variables of a module: the caller's own, or of one that the caller names.
        name: of the function.
    """

    namespace: dict[str, Any]
    name: str

    @property
    def function(self) -> Callable[..., Any]:
        """The function that is there now."""
        function: Callable[..., Any] = self.namespace[self.name]
        return function

    @contextmanager
    def replaced_by(self, function: Callable[..., Any]) -> Iterator[None]:
        """Let the caller find ``function`` for as long as this lasts."""
        original = self.function
        self.namespace[self.name] = function
        try:
            yield
        finally:
            self.namespace[self.name] = original


def find_call(trainer: type, method: str, *names: str) -> CalledFunction | None:
    """The last function of a chain of calls that begins in a method of the trainer class.

    Args:
        trainer: a trainer class of sd-scripts.
        method: the name of one of its methods, its own or inherited.
        names: functions, each called by the one before, the first by the method.

    Returns:
        Where the last of them is looked up, or None where one of the calls is not made.
    """
    callers: list[Any] = [vars(cls)[method] for cls in trainer.__mro__ if method in vars(cls)]
    found = None
    for name in names:
        found = next(filter(None, (_lookup(caller, name) for caller in callers)), None)
        if found is None:
            return None
        callers = [found.function]
    return found


def _lookup(caller: Any, name: str) -> CalledFunction | None:
    """Where the code of ``caller`` reads ``name``: its own module's variables, or those of a module that it names."""
    caller = inspect.unwrap(caller)
    path: list[str] = []
    for instruction in dis.get_instructions(caller):
        if instruction.opname == "EXTENDED_ARG":
            continue
        if instruction.opname == "LOAD_GLOBAL":
            path = [instruction.argval]
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and path:
            path.append(instruction.argval)
        else:
            path = []
        if path and path[-1] == name:
            namespace = caller.__globals__
            for module in path[:-1]:
                namespace = getattr(namespace.get(module), "__dict__", {})
            return CalledFunction(namespace, name) if name in namespace else None
    return None


def check_methods(trainer: type, needed: Mapping[str, tuple[str, ...]] = METHODS) -> None:
    """Check that a trainer class has the methods in ``needed``, with the parameters named there.

    Raises:
        UnsupportedTrainerError: names the method or parameter that is missing.
    """
    for name, parameters in needed.items():
        method = getattr(trainer, name, None)
        if method is None:
            raise unsupported(trainer, f"the method {name} in {trainer.__name__}", "none of that name")
        found = inspect.signature(method).parameters
        _check_names(trainer, f"parameters of {trainer.__name__}.{name}", parameters, list(found))


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
        raise unsupported(trainer, f"the calls {' -> '.join(chain)} in {trainer.__name__}", f"only {found}")
    drawing = calls[-1]
    parameters = inspect.signature(drawing.function).parameters
    if not parameters.keys() <= set(expected.parameters):
        known = f"at most {', '.join(expected.parameters)} as the parameters of {drawing.name}"
        raise unsupported(trainer, known, ", ".join(parameters))
    used = [name for call in calls for name in inspect.unwrap(call.function).__code__.co_names]
    _check_names(trainer, f"training arguments in {drawing.name}", expected.options, used)
    return drawing


def masked_loss(trainer: type) -> Callable[..., Any]:
    """sd-scripts' own function that masks a loss by the masks of a batch.

    Raises:
        UnsupportedTrainerError: ``process_batch`` calls none.
    """
    found = find_call(trainer, "process_batch", MASKED_LOSS)
    if found is None:
        raise unsupported(trainer, f"a call of {MASKED_LOSS} in {trainer.__name__}.process_batch", "none")
    return found.function


def check_datasets(trainer: type) -> None:
    """Check that data sets know the images of a batch, and that a running trainer's data sets can be found.

    Raises:
        UnsupportedTrainerError: names what is missing.
    """
    train: Any = inspect.unwrap(trainer.train)  # type: ignore[attr-defined]
    code = train.__code__
    _check_names(trainer, "variables of train", DATASET_GROUPS, (*code.co_varnames, *code.co_cellvars))
    dataset = train.__globals__.get(DATASET)
    if dataset is None:
        raise unsupported(trainer, f"the class {DATASET}", "none of that name")
    used = dataset.__getitem__.__code__.co_names
    _check_names(trainer, f"names in {DATASET}.__getitem__", (*DATASET_ATTRIBUTES, *BATCH_NAMES), used)
    image = _lookup(dataset.__init__, IMAGE)
    parameters = inspect.signature(image.function).parameters if image else ()
    _check_names(trainer, f"parameters of {IMAGE}", IMAGE_PARAMETERS, parameters)


def check_everything(trainer: type, kind: TrainerKind, *, guidance: bool) -> None:
    """Check all that any option could need of a trainer class, for which guidance_token may be defined.

    Raises:
        UnsupportedTrainerError: names what is missing.
    """
    for methods in (METHODS, VALIDATION_METHODS, BALANCE_METHODS, QUALITY_METHODS):
        check_methods(trainer, methods)
    drawing_function(trainer, kind)
    masked_loss(trainer)
    check_datasets(trainer)
    if guidance:
        check_methods(trainer, GUIDANCE_METHODS)


def _check_names(trainer: type, kind: str, needed: Iterable[str], found: Iterable[str]) -> None:
    found = list(dict.fromkeys(found))
    missing = [name for name in needed if name not in found]
    if missing:
        raise unsupported(trainer, f"{', '.join(missing)} among the {kind}", ", ".join(found) or "none")


def unsupported(trainer: type, looked_for: str, found: str) -> UnsupportedTrainerError:
    """The error for a host in which an assumption does not hold; names its version and those that work.

    Args:
        trainer: the trainer class.
        looked_for: what is assumed.
        found: what is there instead.
    """
    train = getattr(trainer, "train", trainer)
    file = Path(inspect.getsourcefile(inspect.unwrap(train)) or ".").resolve()
    return UnsupportedTrainerError(
        f"sd-scripts {version(file.parent)} in {file.parent} cannot be used with kohya_patch: looked for {looked_for}, "
        f"and found {found}. {WORKING_VERSIONS}. Update sd-scripts where it is older (git pull) or freq_loss_plugin "
        'where it is newer, or train without the frequency loss by setting network_module back to "networks.lora"'
    )


def version(folder: Path) -> str:
    """Tag, commit and date of the checkout in ``folder``; "of an unknown version" without git."""
    unknown = "of an unknown version"
    if not (folder / ".git").exists():  # git would answer for a folder above it
        return unknown
    commands = ("describe --tags --always --long", "log -1 --format=%cs")
    options: dict[str, Any] = {"cwd": folder, "capture_output": True, "text": True, "check": True}
    try:
        printed = [subprocess.run(["git", *command.split()], **options).stdout.strip() for command in commands]
    except (OSError, subprocess.CalledProcessError):
        return unknown
    return " of ".join(printed)
