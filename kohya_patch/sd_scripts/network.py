"""The network module that sd-scripts calls: reads the options, makes the wrapped network, attaches the hook."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from freq_loss_plugin import ConfigError, FreqLossConfig

from .. import checks, config_file, report, wrapped_module
from ..host import UnsupportedTrainerError
from . import balance, guidance, host, image_quality
from .hook import LossHook
from .host import SD_SCRIPTS
from .trainers import FAMILIES, Family, TrainingRun


def create_network(*arguments: Any, **network_args: Any) -> Any:
    """See `kohya_patch.create_network`."""
    run = _require_run()
    config = check(run)
    module = import_module(wrapped_module.name_of(config, run.family))
    network = module.create_network(*arguments, **wrapped_module.own_args(network_args))
    return _attach(network, run, config, module, arguments, network_args)


def create_network_from_weights(*arguments: Any, **network_args: Any) -> Any:
    """See `kohya_patch.create_network_from_weights`."""
    # With for_inference the weights are merged into the model (base_weights) or used for images; nothing is trained.
    trains = not network_args.get("for_inference", False)
    run = _require_run() if trains else TrainingRun.find()
    config = FreqLossConfig() if run is None else check(run)
    family = None if run is None else run.family
    module = import_module(wrapped_module.name_of(config, family))
    network, weights = module.create_network_from_weights(*arguments, **wrapped_module.own_args(network_args))
    if run is not None and trains:
        # weights_sd or a file comes after the multiplier here; the text encoder is one place earlier.
        network = _attach(network, run, config, module, (None, *arguments), network_args)
    return network, weights


def check_before_models_load() -> None:
    """Run `check` for the run that is just starting (see `kohya_patch.startup`).

    Raises:
        ConfigError: as `check`.
        UnsupportedTrainerError: as `check`, and where the script that is starting does not train on images.
    """
    check(_require_run())


def _require_run() -> TrainingRun:
    run = TrainingRun.find()
    if run is None:
        script = Path(sys.argv[0]).name
        raise UnsupportedTrainerError(
            f"network_module = {wrapped_module.OWN_NAME!r} in {script}: the frequency loss needs batches of images "
            "that NetworkTrainer.train of a *train_network.py script of sd-scripts trains on, and no training of "
            "sd-scripts is running that way (train_leco.py and sdxl_train_leco.py train on prompts alone). "
            'Use train_network.py, sdxl_train_network.py, ..., or set network_module = "networks.lora"'
        )
    return run


def check(run: TrainingRun) -> FreqLossConfig:
    """Read and validate everything that can be known before a batch is seen.

    Raises:
        ConfigError: an option, or its combination with the trainer's own options, cannot work.
        UnsupportedTrainerError: this sd-scripts lacks what the options need.
    """
    args, family = run.args, run.family
    config = config_file.read_config(args)
    name = wrapped_module.name_of(config, family)
    wrapped_module.check_name(name, SD_SCRIPTS)
    check_fit(name, family)
    trainer = type(run.trainer)
    SD_SCRIPTS.check_methods(trainer, host.METHODS)
    if config.balanced:
        balance.check(config, args, family)
    if config.balanced or config.gated:
        SD_SCRIPTS.check_methods(trainer, host.BALANCE_METHODS)
    if config.changes_training:
        _check_against_trainer(config, args, family)
        _check_host(config, args, trainer, family)
    if config.guided:
        guidance.check(config, args, family)
        SD_SCRIPTS.check_methods(trainer, host.GUIDANCE_METHODS)
    if config.gated:
        image_quality.check(config, args)
        SD_SCRIPTS.check_methods(trainer, host.QUALITY_METHODS)
    if config.guided or config.gated:
        host.check_datasets(trainer)
    return config


def check_fit(name: str, family: Family) -> None:
    """Raise ConfigError where a network module of sd-scripts is not one for this trainer."""
    supported = [FAMILIES[trainer] for trainer in host.NETWORK_MODULES.get(name, ())]
    if supported and family not in supported:
        raise ConfigError(
            f"freq_loss_network_module = {name!r}: this trainer is {family.name}, and sd-scripts' module is for "
            f"{' and '.join(each.name for each in supported)} only; for LoHa and LoKr set freq_loss_network_module = "
            f"'lycoris.kohya' (pip install lycoris_lora), for LoRA '{family.network_module}'"
        )


def _check_host(config: FreqLossConfig, args: argparse.Namespace, trainer: type, family: Family) -> None:
    if config.gated or (config.enabled and config.timesteps != "own"):
        host.drawing_function(trainer, family.kind)
    if getattr(args, "masked_loss", False) or getattr(args, "alpha_mask", False):
        host.masked_loss(trainer)
    if config.validation:
        SD_SCRIPTS.check_methods(trainer, host.VALIDATION_METHODS)


def _check_against_trainer(config: FreqLossConfig, args: argparse.Namespace, family: Family) -> None:
    checks.check_deepspeed(args)
    zero_terminal_snr = bool(getattr(args, "zero_terminal_snr", False))
    config.check_model(family.prediction_type(args), zero_terminal_snr=zero_terminal_snr)
    shape = getattr(args, "model_prediction_type", "raw")
    if family.kind == "flow" and shape != "raw" and config.validation:
        raise ConfigError(
            f"freq_loss_validation = true with model_prediction_type = {shape!r}: the difference of a reshaped "
            "prediction and a bare velocity is not a latent-space error; set model_prediction_type = 'raw'"
        )
    if config.enabled and config.timesteps != "unified" and family.kind == "flow" and shape != "raw":
        raise ConfigError(
            f"freq_loss_timesteps = {config.timesteps!r} with model_prediction_type = {shape!r}: sd-scripts then "
            "compares a reshaped prediction with a bare velocity, whose difference is not a latent-space error; set "
            "model_prediction_type = 'raw' (what sd-scripts' guides recommend), or freq_loss_timesteps = 'unified'"
        )
    checks.check_block_swap(config, args)
    resolution = _smallest_side(getattr(args, "resolution", None))
    if resolution:
        config.check_size(resolution // 8, resolution // 8)


def _smallest_side(resolution: Any) -> int | None:
    """The smaller side of ``resolution`` as sd-scripts spells it: 512, "512", "512,768" or a tuple; None if not."""
    parts = resolution.split(",") if isinstance(resolution, str) else resolution
    try:
        return min(int(part) for part in (parts if isinstance(parts, (list, tuple)) else [parts]))
    except (TypeError, ValueError):
        return None  # sd-scripts will complain in its own words


def _attach(
    network: Any,
    run: TrainingRun,
    config: FreqLossConfig,
    module: ModuleType,
    arguments: tuple[Any, ...],
    network_args: Mapping[str, Any],
) -> Any:
    if network is None:
        return None  # sd-scripts stops here by itself
    tokens = guidance.TokenGuidance(run, _text_width(arguments)) if config.guided else None
    quality = image_quality.make_quality(run, config, _vae(arguments)) if config.gated else None
    LossHook(run, config, module.__name__, tokens, quality).install()
    report.announce(run, config, module.__name__, tokens.features if tokens else None, quality)
    report.warn([*wrapped_module.ignored_args(module, network_args), *config_file.foreign_keys(run.args)])
    return network


def _vae(arguments: tuple[Any, ...]) -> Any:
    """The VAE, the fourth argument of sd-scripts' ``create_network``."""
    return arguments[3] if len(arguments) > 3 else None


def _text_width(arguments: tuple[Any, ...]) -> int | None:
    """Width of the text encoder, the fifth argument of sd-scripts' ``create_network``."""
    return getattr(getattr(arguments[4], "config", None), "hidden_size", None) if len(arguments) > 4 else None
