"""What a run writes: the metadata of its LoRA file, and the state from which it can be resumed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..atomic_files import write_whole
from ..guidance_token.features import CLIP_KEY, Features, file_metadata
from ..image_quality.survey import SUMMARY_KEY, listed
from ..lora.kohya_format import NETWORK_MODULE
from ..options.config import FreqLossConfig
from ..options.fields import ConfigError
from .dataset import DataSet
from .settings import Settings

# The settings that may differ when a run is resumed.
_MAY_CHANGE = {
    "max_train_steps",
    "save_every_n_steps",
    "save_precision",
    "logging_dir",
    "log_with",
    "output_dir",
    "output_name",
}


def metadata(settings: Settings, loss: FreqLossConfig, data: DataSet, step: int, started: float) -> dict[str, str]:
    """The metadata of the LoRA file: the ``ss_*`` entries of sd-scripts, and those of the loss, as the hook has.

    Args:
        settings: the training settings.
        loss: the options of the frequency loss.
        data: the training images.
        step: optimizer steps done.
        started: when the run started, in seconds since the epoch.
    """
    unet_rate, text_rate = settings.learning_rates
    version = "sd_v2" if settings.v2 else "sd_v1"
    entries: dict[str, Any] = {
        "ss_network_module": NETWORK_MODULE,
        "ss_network_dim": settings.network_dim,
        "ss_network_alpha": settings.alpha,
        "ss_base_model_version": f"{version}_v" if settings.v2 and settings.v_parameterization else version,
        "ss_v2": settings.v2,
        "ss_sd_model_name": Path(settings.pretrained_model_name_or_path).name,
        "ss_output_name": settings.output_name,
        "ss_learning_rate": settings.learning_rate,
        "ss_unet_lr": unet_rate,
        "ss_text_encoder_lr": text_rate or None,
        "ss_optimizer": settings.optimizer_type,
        "ss_lr_scheduler": settings.lr_scheduler,
        "ss_lr_warmup_steps": settings.warmup_steps,
        "ss_max_train_steps": settings.max_train_steps,
        "ss_steps": step,
        "ss_total_batch_size": settings.train_batch_size,
        "ss_gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "ss_gradient_checkpointing": settings.gradient_checkpointing,
        "ss_mixed_precision": settings.mixed_precision,
        "ss_seed": settings.seed,
        "ss_resolution": str(settings.size),
        "ss_enable_bucket": settings.enable_bucket,
        "ss_clip_skip": settings.clip_skip,
        "ss_min_snr_gamma": settings.min_snr_gamma,
        "ss_zero_terminal_snr": settings.zero_terminal_snr,
        "ss_num_train_images": sum(example.repeats for example in data.examples),
        "ss_training_started_at": started,
        "ss_tag_frequency": json.dumps(data.tag_frequency),
    }
    texts = {key: str(value) for key, value in entries.items()}
    if loss.changes_training or data.features is not None:
        texts |= loss.file_metadata(NETWORK_MODULE)
    if data.survey is not None:
        texts[SUMMARY_KEY] = data.survey.summary
    return texts if data.features is None else texts | file_metadata(loss.guidance_token, data.features)


def write_state(settings: Settings, loss: FreqLossConfig, data: DataSet, state: dict[str, Any]) -> None:
    """Write the state from which `read_state` resumes, atomically.

    Raises:
        OSError: it cannot be written.
    """
    identity = {"settings": _identity(settings, loss, data.features), "images": _images(settings, data)}
    write_whole(settings.state_file, lambda part: torch.save(state | identity, part))


def _identity(settings: Settings, loss: FreqLossConfig, features: Features | None) -> dict[str, str]:
    """The settings and options that must be the same when a run is resumed."""
    identity = {key: str(value) for key, value in asdict(settings).items() if key not in _MAY_CHANGE}
    identity |= {key: str(value) for key, value in loss.metadata().items()}
    return identity if features is None else identity | {CLIP_KEY: features.clip}


def _images(settings: Settings, data: DataSet) -> dict[str, int]:
    """The training images and their repeats: which of them a batch holds depends on all."""
    root = Path(settings.train_data_dir)
    return {example.file.relative_to(root).as_posix(): example.repeats for example in data.examples}


def read_state(settings: Settings, loss: FreqLossConfig, data: DataSet) -> dict[str, Any]:
    """Read the state that an earlier run saved.

    Raises:
        ConfigError: there is none, it cannot be read, or it was saved with other settings or images.
    """
    file = settings.state_file
    if not file.is_file():
        raise ConfigError(
            f"--resume: there is no saved state {file}; a state is written at the end, on Ctrl-C, and every "
            "save_every_n_steps. Train without --resume first, or check output_dir and output_name"
        )
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"--resume: {file} cannot be read ({error}); train without --resume") from error
    saved: dict[str, str] = state["settings"]
    for key, value in _identity(settings, loss, data.features).items():
        if saved.get(key) != value:
            raise ConfigError(
                f"--resume: {file} was saved with {key.removeprefix('ss_')} = {saved.get(key)}, and this run has "
                f"{value}; use the same settings, or train without --resume"
            )
    _check_images(file, state["images"], _images(settings, data))
    return state


def _check_images(file: Path, saved: dict[str, int], now: dict[str, int]) -> None:
    changes = {
        "added": [name for name in now if name not in saved],
        "missing": [name for name in saved if name not in now],
        "with other repeats": [name for name in now if now[name] != saved.get(name, now[name])],
    }
    if any(changes.values()):
        found = "; ".join(f"{len(names)} {what} ({listed(names)})" for what, names in changes.items() if names)
        raise ConfigError(
            f"--resume: the training images are not those with which {file} was saved: {found}. Batches depend on all "
            "images, and one that has been trained on may become a validation image; restore them, or train without "
            "--resume"
        )
