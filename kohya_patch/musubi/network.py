"""The network module that musubi-tuner calls: reads the options, makes the wrapped network, attaches the hook."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import safe_open

from freq_loss_plugin import ConfigError, FreqLossConfig

from .. import checks, config_file, report, wrapped_module
from ..host import UnsupportedTrainerError
from . import host, image_quality, timesteps
from .hook import LossHook
from .host import MUSUBI
from .trainers import Family, TrainingRun


def create_network(*arguments: Any, **network_args: Any) -> Any:
    """See `kohya_patch.create_arch_network`."""
    run = _require_run()
    config = check(run)
    name = wrapped_module.name_of(config, run.family)
    module = import_module(_importable(name))
    create = getattr(module, "create_arch_network", None)
    if create is None:  # as musubi-tuner calls LyCORIS, without a dropout
        network_args.pop("neuron_dropout", None)
        create = module.create_network
    network = create(*arguments, **wrapped_module.own_args(network_args))
    return _attach(network, run, config, name, module, network_args)


def create_network_from_weights(*arguments: Any, **network_args: Any) -> Any:
    """See `kohya_patch.create_arch_network_from_weights`."""
    # With for_inference the weights are merged into the model (base_weights) or used for samples; nothing is trained.
    trains = not network_args.get("for_inference", False)
    run = _require_run()
    config = check(run)
    name = wrapped_module.name_of(config, run.family)
    module = import_module(_importable(name))
    made = module.create_arch_network_from_weights(*arguments, **wrapped_module.own_args(network_args))
    if trains:
        # With dim_from_weights, musubi-tuner unpacks a network and its weights.
        network = made[0] if isinstance(made, tuple) else made
        _attach(network, run, config, name, module, network_args)
    return made


def check_before_models_load() -> None:
    """Run `check` for the run that is just starting (see `kohya_patch.startup`).

    Raises:
        ConfigError: as `check`.
        UnsupportedTrainerError: as `check`.
    """
    check(_require_run())


def check(run: TrainingRun) -> FreqLossConfig:
    """Read and validate everything that can be known before a batch is seen.

    Raises:
        ConfigError: an option, or its combination with the trainer's own options, cannot work.
        UnsupportedTrainerError: this musubi-tuner lacks what the options need.
    """
    args, family = run.args, run.family
    config = config_file.read_config(args)
    name = wrapped_module.name_of(config, family)
    wrapped_module.check_name(_importable(name), MUSUBI)
    _check_defined(config, family)
    trainer = type(run.trainer)
    MUSUBI.check_methods(trainer, host.METHODS)
    if config.changes_training:
        config.check_model(family.prediction_type(args), zero_terminal_snr=False)
        checks.check_deepspeed(args)
        checks.check_block_swap(config, args)
        checks.check_weighting_scheme(config, args)
        _check_two_models(config, args)
        _check_timestep_buckets(config, args)
        if _chooses_timesteps(config):
            timesteps.check(run.trainer, args)
    if config.gated:
        MUSUBI.check_methods(trainer, host.QUALITY_METHODS)
        image_quality.check(config, args)
    return config


def _require_run() -> TrainingRun:
    run = TrainingRun.find()
    if run is None:
        raise UnsupportedTrainerError(
            f"network_module = {wrapped_module.OWN_NAME!r} in {Path(sys.argv[0]).name}: no trainer of musubi-tuner "
            "that this plug-in knows is running; use one of its *_train_network.py scripts, or set network_module = "
            f'"{MUSUBI.plain_module}"'
        )
    return run


def _importable(name: str) -> str:
    """musubi-tuner's own modules are ``networks.*``, but found by that name only once it makes a network."""
    own = f"{host.PACKAGE}.{name}"
    return own if wrapped_module.find(name) is None and wrapped_module.find(own) is not None else name


def _check_defined(config: FreqLossConfig, family: Family) -> None:
    if config.guided:
        raise ConfigError(
            f"guidance_token = {config.guidance_token:g}: replaces the last token of one CLIP text encoder, which is "
            f"how SD1.x and SD2.x read text; this trainer is {family.name}; set guidance_token = 0"
        )
    if config.changes_training and family.undefined:
        raise ConfigError(
            f"{family.name} {family.undefined}, so the frequency loss is not defined for it; set dist_match = 0 and "
            "leave freq_loss_balance and freq_loss_image_quality off"
        )
    if config.enabled and config.validation:
        raise ConfigError(
            "freq_loss_validation = true: musubi-tuner has no validation, so there is nothing to look at; set "
            "freq_loss_validation = false"
        )


def _check_two_models(config: FreqLossConfig, args: argparse.Namespace) -> None:
    """Wan 2.2 can train its models for high and low noise at once: the timestep of a batch then decides which one."""
    if not getattr(args, "dit_high_noise", None):
        return
    if _chooses_timesteps(config):
        key = "freq_loss_image_quality" if config.gated else f"freq_loss_timesteps = {config.timesteps!r}"
        raise ConfigError(
            f"{key} with dit_high_noise: the timesteps decide which of the two models is trained, and cannot be "
            "changed afterward; set freq_loss_timesteps = 'own' and freq_loss_image_quality = 'off', or train one "
            "model at a time"
        )


def _check_timestep_buckets(config: FreqLossConfig, args: argparse.Namespace) -> None:
    """musubi-tuner can spread the timesteps of an epoch evenly; those that are drawn by themselves are not."""
    buckets, shares = getattr(args, "num_timestep_buckets", None) or 0, config.enabled and config.timesteps == "shared"
    if buckets > 1 and (shares or config.gated):
        key = "freq_loss_timesteps = 'shared'" if shares else "freq_loss_image_quality"
        raise ConfigError(
            f"{key} with num_timestep_buckets = {buckets}: draws timesteps by itself, which would not be spread over "
            "the buckets; remove num_timestep_buckets, or set freq_loss_timesteps = 'own' and freq_loss_image_quality "
            "= 'off'"
        )


def _chooses_timesteps(config: FreqLossConfig) -> bool:
    """Whether a pass is made at timesteps that the trainer has not drawn."""
    return config.gated or (config.enabled and config.timesteps != "own")


def _check_sizes(run: TrainingRun, config: FreqLossConfig) -> None:
    """Raise ConfigError where the latents of a data set are too small for the levels, by one of each bucket."""
    if not config.enabled and config.balance != "band":
        return
    for dataset in run.datasets:
        for bucket in getattr(dataset.batch_manager, "buckets", {}).values():
            with safe_open(bucket[0].latent_cache_path, "pt") as cache:
                (key,) = filter(image_quality.is_latent, cache.keys())
                config.check_size(*cache.get_slice(key).get_shape()[-2:])


def _attach(
    network: Any,
    run: TrainingRun,
    config: FreqLossConfig,
    name: str,
    module: ModuleType,
    network_args: Mapping[str, Any],
) -> Any:
    if network is None:
        return None  # musubi-tuner stops here by itself
    _check_sizes(run, config)
    quality = image_quality.make_quality(run, config) if config.gated else None
    LossHook(run, config, name, quality).install()
    report.announce(run, config, name, quality=quality)
    report.warn([*wrapped_module.ignored_args(module, network_args), *config_file.foreign_keys(run.args)])
    return network
