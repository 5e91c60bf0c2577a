"""The keys of a kohya TOML that the engine knows, checked before anything is loaded.

Every key means what it means in sd-scripts. The defaults are those of sd-scripts, unless the demo needs others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import toml

from ..loss.latents import NUM_TRAIN_TIMESTEPS, PredictionType
from ..options.config import FreqLossConfig
from ..options.fields import ConfigError, check_options, key_of, nearest, option, wrong_value
from ..options.files import load_toml
from ..options.keys import SECTION
from ..options.parsing import flatten, parse_pairs, parse_strings
from .spellings import as_list, unify

NETWORK_MODULES = ("kohya_patch", "networks.lora")
# What diffusers.optimization.get_scheduler and sd-scripts both know.
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
USE_SD_SCRIPTS = (
    "The engine of freq_loss_plugin supports a subset of sd-scripts; for the rest train the same TOML with sd-scripts "
    "(https://github.com/kohya-ss/sd-scripts): accelerate launch train_network.py --config_file YOUR.toml"
)


@dataclass(frozen=True)
class Settings:
    """The training settings, validated when made.

    Raises:
        ConfigError: a value of the wrong type or outside its range, or two that contradict each other.
    """

    pretrained_model_name_or_path: str = option("", "SD1.x or SD2.x: a diffusers folder or a .safetensors file")
    v2: bool = option(False, "the model is an SD2.x")
    v_parameterization: bool = option(False, "the model predicts v")
    zero_terminal_snr: bool = option(False, "rescale the noise schedule to zero terminal SNR")
    clip_skip: int | None = option(None, "use the output of this layer of the text encoder, counted from the end")

    train_data_dir: str = option("", "a folder of folders like 10_mycat: repeats, underscore, any name")
    caption_extension: str = option(".caption", "file name extension of the captions")
    resolution: str = option("512", "side of the images in pixels, or width,height")  # sd-scripts has no default
    enable_bucket: bool = option(False, "train each image at the aspect ratio nearest to its own")
    min_bucket_reso: int = option(256, "smallest side of a bucket in pixels")
    max_bucket_reso: int = option(1024, "largest side of a bucket in pixels")
    bucket_reso_steps: int = option(64, "sides of buckets are multiples of this")
    train_batch_size: int = option(4, "images per batch")  # sd-scripts: 1
    cache_latents: bool = option(True, "latents are always cached before training", choices=(True,))

    network_module: str = option("kohya_patch", "the network module that sd-scripts would use", choices=NETWORK_MODULES)
    network_dim: int = option(4, "rank of the LoRA")
    network_alpha: float = option(1.0, "the LoRA is scaled by network_alpha / network_dim; 0 for network_dim")
    network_train_unet_only: bool = option(False, "do not train the text encoder")
    learning_rate: float = option(1e-4, "learning rate")  # sd-scripts: 2e-6
    unet_lr: float | None = option(None, "learning rate of the UNet's LoRA; default: learning_rate")
    text_encoder_lr: float | None = option(None, "learning rate of the text encoder's LoRA; default: learning_rate")
    lr_scheduler: str = option("constant", "learning rate schedule", choices=LR_SCHEDULERS)
    lr_warmup_steps: float = option(0, "warmup steps of the learning rate; below 1, a fraction of max_train_steps")
    lr_scheduler_num_cycles: int = option(1, "restarts of cosine_with_restarts")
    optimizer_type: str = option("AdamW", "the optimizer", choices=("AdamW",))
    max_grad_norm: float = option(1.0, "clip the gradient to this norm; 0 for no limit")
    max_train_steps: int = option(1600, "optimizer steps")
    gradient_accumulation_steps: int = option(1, "batches per optimizer step")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    mixed_precision: str = option("no", "precision of the frozen weights", choices=("no", "fp16", "bf16"))
    sdpa: bool = option(True, "attention is always torch's scaled_dot_product_attention", choices=(True,))
    seed: int = option(42, "random seed")  # sd-scripts draws one
    min_snr_gamma: float | None = option(None, "min-SNR weights of the base loss; 5 is usual")
    min_timestep: int | None = option(None, "smallest timestep of the base loss")
    max_timestep: int | None = option(None, "largest timestep of the base loss, exclusive")

    validation_split: float = option(0.0, "fraction of the images that is held out for validation")
    validate_every_n_steps: int | None = option(None, "steps between validations; default: a tenth of the run")

    output_dir: str = option("output", "folder for everything that is written")
    output_name: str = option("last", "name of the LoRA file")
    save_model_as: str = option("safetensors", "format of the LoRA file", choices=("safetensors",))
    save_precision: str | None = option(None, "precision of the LoRA file", choices=("float", "fp16", "bf16"))
    save_every_n_steps: int | None = option(None, "also write LoRA and state every so many steps")
    logging_dir: str | None = option(None, "folder for TensorBoard logs")
    log_with: str | None = option(None, "the tracker; default: tensorboard", choices=("tensorboard", "wandb"))

    def __post_init__(self) -> None:
        check_options(self)
        self._check_ranges()
        self._check_paths()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        try:
            sides = [int(part) for part in str(self.resolution).split(",")]
        except ValueError:
            sides = []
        if len(sides) not in (1, 2) or any(side < 64 or side % 8 for side in sides):
            raise wrong_value(
                self, "resolution", 'a side like 512, or "width,height", of at least 64 and divisible by 8'
            )
        return sides[0], sides[-1]

    @property
    def bucket_limits(self) -> tuple[int, int]:
        """The smallest and largest side of a bucket: as sd-scripts makes those given multiples of the step."""
        step = self.bucket_reso_steps
        return max(self.min_bucket_reso // step, 1) * step, -(-self.max_bucket_reso // step) * step

    @property
    def prediction_type(self) -> PredictionType:
        """What the model predicts."""
        return "v_prediction" if self.v_parameterization else "epsilon"

    @property
    def learning_rates(self) -> tuple[float, float]:
        """Learning rates of the UNet and of the text encoder; 0 if it is not trained."""
        text = 0.0 if self.network_train_unet_only else _or(self.text_encoder_lr, self.learning_rate)
        return _or(self.unet_lr, self.learning_rate), text

    @property
    def alpha(self) -> float:
        """The LoRA is scaled by this over its rank."""
        return self.network_alpha or float(self.network_dim)

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        ratio = self.lr_warmup_steps
        return int(ratio * self.max_train_steps) if ratio < 1 else int(ratio)

    @property
    def lora_file(self) -> Path:
        """Path of the trained LoRA."""
        return Path(self.output_dir) / f"{self.output_name}.safetensors"

    @property
    def state_file(self) -> Path:
        """Path of the state for resuming."""
        return Path(self.output_dir) / f"{self.output_name}.state"

    def _check_ranges(self) -> None:
        counts = ("network_dim", "train_batch_size", "max_train_steps", "gradient_accumulation_steps")
        sides = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
        for name in (*counts, *sides, "lr_scheduler_num_cycles"):
            if getattr(self, name) < 1:
                raise wrong_value(self, name, "a whole number >= 1")
        for name in ("save_every_n_steps", "validate_every_n_steps", "clip_skip"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise wrong_value(self, name, "a whole number >= 1; leave it out for none")
        rates = ("learning_rate", "unet_lr", "text_encoder_lr")
        for name in (*rates, "max_grad_norm", "lr_warmup_steps", "network_alpha"):
            if not 0 <= _or(getattr(self, name), 0) < math.inf:
                raise wrong_value(self, name, "a finite number >= 0")
        if not 0 < _or(self.min_snr_gamma, 1) < math.inf:
            raise wrong_value(self, "min_snr_gamma", "a finite number > 0")
        if not self.caption_extension.strip("."):
            raise wrong_value(self, "caption_extension", "the ending of the caption files, like '.txt'")
        if self.lr_warmup_steps > 1 and self.lr_warmup_steps % 1:
            raise wrong_value(self, "lr_warmup_steps", "a whole number of steps, or a fraction of the run below 1")
        if not 0 <= self.validation_split < 1:
            raise wrong_value(self, "validation_split", "a number from 0 to below 1")
        first, end = _or(self.min_timestep, 0), _or(self.max_timestep, NUM_TRAIN_TIMESTEPS)
        if not 0 <= first < end <= NUM_TRAIN_TIMESTEPS:
            raise ConfigError(
                f"min_timestep = {first} and max_timestep = {end}: expected 0 <= min_timestep < max_timestep <= "
                f"{NUM_TRAIN_TIMESTEPS}"
            )
        if self.bucket_reso_steps % 8:
            raise wrong_value(self, "bucket_reso_steps", "a multiple of 8, the factor of the VAE")
        if not any(self.learning_rates):
            raise ConfigError("every learning rate is 0, so nothing would be trained; set learning_rate")
        size, (low, high) = self.size, self.bucket_limits
        if self.enable_bucket and not low <= min(size) <= max(size) <= high:
            raise wrong_value(self, "resolution", f"sides of {low} (min_bucket_reso) to {high} (max_bucket_reso)")

    def _check_paths(self) -> None:
        if not self.output_name:
            raise wrong_value(self, "output_name", "a name for the LoRA file, like 'my_lora'")
        for name, example in (("pretrained_model_name_or_path", "sd15.safetensors"), ("train_data_dir", "photos")):
            if not getattr(self, name):
                raise ConfigError(f'{name} is missing: write {name} = "{example}" into the TOML')
        if not Path(self.train_data_dir).is_dir():
            raise wrong_value(self, "train_data_dir", "an existing folder")


def read(values: Mapping[str, Any]) -> tuple[Settings, FreqLossConfig]:
    """Read settings and loss options from the content of a TOML.

    Args:
        values: keys and values, flat or in sections, which are flattened by one level as in sd-scripts.

    Raises:
        ConfigError: a key that neither the engine nor the loss knows, or an invalid value.
    """
    FreqLossConfig.check_section(values.get(SECTION, {}))
    flat = flatten(values)
    given = parse_strings(FreqLossConfig, _network_args(flat.pop("network_args", None)))
    loss = FreqLossConfig.from_mapping({**values, **given})
    known = {key_of(field): field.name for field in fields(Settings)}
    for key in flat:
        if key not in known and key not in FreqLossConfig.fields_by_key():
            raise unknown_key(key)
    if loss.balanced and flat.get("min_snr_gamma"):
        raise ConfigError(
            f"freq_loss_balance = {loss.balance!r} with min_snr_gamma = {flat['min_snr_gamma']}: both weigh the loss "
            "by noise level; remove min_snr_gamma, or set freq_loss_balance = 'off'"
        )
    unify(flat)
    settings = Settings(**{known[key]: value for key, value in flat.items() if key in known})
    return settings, _check_network_module(settings, loss, {*flat, *given})


def read_file(path: Path, overrides: Mapping[str, Any]) -> tuple[Settings, FreqLossConfig]:
    """Read settings and loss options from a TOML file.

    Args:
        path: the file.
        overrides: keys and values that take precedence, from the command line.

    Raises:
        ConfigError: the file is missing or not a TOML, or as for `read`.
    """
    values = load_toml(path, "--config")
    return read(override(values, overrides))


def override(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Replace keys of a TOML's content, whatever section they are in.

    Args:
        values: keys and values, flat or in sections.
        overrides: keys and values that take precedence.
    """
    replaced = {
        name: {key: value for key, value in table.items() if key not in overrides}
        if isinstance(table, Mapping)
        else table
        for name, table in values.items()
    }
    return {**replaced, **overrides}


def unknown_key(key: str) -> ConfigError:
    """The error for a key that neither the engine nor the loss knows; suggests a similar one."""
    known = [*map(key_of, fields(Settings)), *FreqLossConfig.fields_by_key()]
    similar = nearest(key, known, cutoff=0.8)
    suggestion = f" Did you mean {similar}?" if similar else ""
    return ConfigError(f"{key}: not supported.{suggestion} Supported keys: {', '.join(known)}. {USE_SD_SCRIPTS}")


def as_toml(settings: Settings, loss: FreqLossConfig) -> str:
    """A TOML with all settings and options that are not at their defaults; sd-scripts reads it, too."""
    # Always written, since sd-scripts has another default, or none.
    always = ("resolution", "train_batch_size", "learning_rate", "seed", "cache_latents", "sdpa", "network_module")
    training = {
        key_of(field): getattr(settings, field.name)
        for field in fields(Settings)
        if field.name in always or getattr(settings, field.name) != field.default
    }
    keys = {name: key for key, name in FreqLossConfig.fields_by_key().items()}
    options = {
        keys[field.name]: getattr(loss, field.name)
        for field in fields(FreqLossConfig)
        if field.name == "dist_match" or getattr(loss, field.name) not in (field.default, None)
    }
    options.pop("min_snr_gamma", None)  # it is among the training settings
    return toml.dumps({"training": training, SECTION: options})


def _check_network_module(settings: Settings, loss: FreqLossConfig, given: set[str]) -> FreqLossConfig:
    """``networks.lora`` trains without the loss, as in sd-scripts; returns the options that are in force."""
    if loss.network_module not in (None, "networks.lora"):
        raise ConfigError(f"freq_loss_network_module = {loss.network_module!r}: not supported. {USE_SD_SCRIPTS}")
    if settings.network_module != "networks.lora":
        return loss
    options = sorted(given & FreqLossConfig.fields_by_key().keys() - {"min_snr_gamma"})
    if options and (loss.changes_training or loss.guided):
        raise ConfigError(
            f'network_module = "networks.lora" trains without the plug-in, and {options[0]} is given; set '
            'network_module = "kohya_patch", or remove the options of the loss'
        )
    return loss.without_effect()


def _network_args(items: Any) -> dict[str, str]:
    pairs = parse_pairs(as_list(items))
    for key in pairs:
        if key not in FreqLossConfig.fields_by_key():
            given = f"{key}={pairs[key]}"
            raise ConfigError(f"network_args: {given!r} is not an option of the frequency loss. {USE_SD_SCRIPTS}")
    return pairs


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
