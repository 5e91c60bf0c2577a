"""What a run writes: the metadata of its LoRA file, and the state from which it can be resumed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..atomic_files import write_whole
from ..guidance_token.features import CLIP_KEY, Features, file_metadata
from ..image_quality.survey import SUMMARY_KEY, listed
from ..lora.kohya_format import NETWORK_MODULE
from ..options.config import FreqLossConfig
from ..options.fields import ConfigError
from ..options.keys import PREFIX
from .dataset import DataSet
from .settings import Settings

# The settings that may differ when a run is resumed. Paths do not tell images or models: their contents are compared.
_MAY_CHANGE = {
    "train_data_dir",
    "pretrained_model_name_or_path",
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
    identity = {"settings": _identity(settings, loss, data.features), "images": _images(data)}
    write_whole(settings.state_file, lambda part: torch.save(state | identity, part))


def _identity(settings: Settings, loss: FreqLossConfig, features: Features | None) -> dict[str, Any]:
    """The settings and options that must be the same when a run is resumed, however they are written."""
    values = asdict(settings) | {"resolution": settings.size, "network_alpha": settings.alpha}
    values = {key: value for key, value in values.items() if key not in _MAY_CHANGE}
    values |= {f"{PREFIX}{key}": value for key, value in asdict(loss).items()}
    # Numbers stay what they are, for 1 is 1.0; tables become text.
    identity = {key: value if isinstance(value, (int, float)) else str(value) for key, value in values.items()}
    return identity if features is None else identity | {CLIP_KEY: features.clip}


def _images(data: DataSet) -> list[dict[str, Any]]:
    """The training images in their order: which of them a batch holds depends on all."""
    return [
        {
            "content": example.content,
            "repeats": example.repeats,
            "caption": example.caption,
            "name": f"{example.file.parent.name}/{example.file.name}",
        }
        for example in data.examples
    ]


def read_state(settings: Settings, loss: FreqLossConfig, data: DataSet) -> dict[str, Any]:
    """Read the state that an earlier run saved.

    Raises:
        ConfigError: there is none, it cannot be read, or it was saved with other settings.
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
    saved: dict[str, Any] = state["settings"]
    for key, value in _identity(settings, loss, data.features).items():
        if saved.get(key) != value:
            raise ConfigError(
                f"--resume: {file} was saved with {key.removeprefix('ss_')} = {saved.get(key)}, and this run has "
                f"{value}; use the same settings, or train without --resume"
            )
    return state


def in_saved_order(settings: Settings, data: DataSet, state: dict[str, Any]) -> DataSet:
    """The training images in the order in which they were when a state was saved, wherever they lie now.

    Args:
        settings: the training settings.
        data: the training images.
        state: what `read_state` returned.

    Raises:
        ConfigError: they are other images, or have other repeats.
    """
    saved, now = state["images"], _images(data)
    _check_images(settings.state_file, saved, now)
    places: dict[tuple[str, int], list[int]] = {}
    for place, image in enumerate(saved):
        places.setdefault((image["content"], image["repeats"]), []).append(place)
    order = [places[image["content"], image["repeats"]].pop(0) for image in now]
    examples = [example for _, example in sorted(zip(order, data.examples, strict=True), key=lambda pair: pair[0])]
    pairs = zip(order, now, strict=True)
    changed = [image["name"] for place, image in pairs if image["caption"] != saved[place]["caption"]]
    warnings = [f"{len(changed)} images have other captions than before: {listed(changed)}"] if changed else []
    return replace(data, examples=examples, warnings=[*data.warnings, *warnings])


def check_model(settings: Settings, identity: str, state: dict[str, Any]) -> None:
    """Check that a state was saved with this model, wherever that lies.

    Args:
        settings: the training settings.
        identity: of the model that is trained now.
        state: what `read_state` returned.

    Raises:
        ConfigError: it was another one.
    """
    if state["model"] != identity:
        raise ConfigError(
            f"--resume: {settings.state_file} was saved with another model than pretrained_model_name_or_path = "
            f"{settings.pretrained_model_name_or_path!r}: its weights differ; use the same model, or train without "
            "--resume"
        )


def _check_images(file: Path, saved: list[dict[str, Any]], now: list[dict[str, Any]]) -> None:
    """Raise ConfigError where not the same contents have the same repeats."""
    before, after = _by_content(saved), _by_content(now)
    added = {name for content, (_, name) in after.items() if content not in before}
    missing = {name for content, (_, name) in before.items() if content not in after}
    changes = {
        "changed": added & missing,
        "added": added - missing,
        "missing": missing - added,
        "with other repeats": {
            name for content, (repeats, name) in after.items() if before.get(content, (repeats, ""))[0] != repeats
        },
    }
    if any(changes.values()):
        found = "; ".join(f"{len(names)} {what} ({listed(sorted(names))})" for what, names in changes.items() if names)
        raise ConfigError(
            f"--resume: the training images are not those with which {file} was saved: {found}. Batches depend on all "
            "images, and one that has been trained on may become a validation image; restore them, or train without "
            "--resume"
        )


def _by_content(images: list[dict[str, Any]]) -> dict[str, tuple[list[int], str]]:
    """The repeats of all copies of an image, and the name of one of them."""
    found: dict[str, tuple[list[int], str]] = {}
    for image in sorted(images, key=lambda image: image["repeats"]):
        found.setdefault(image["content"], ([], image["name"]))[0].append(image["repeats"])
    return found
