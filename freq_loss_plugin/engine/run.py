"""From settings to a LoRA file: check everything, load, train."""

from __future__ import annotations

from dataclasses import replace

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from .. import image_files
from ..guidance_token import features as clip_features
from ..lora import kohya_format
from ..options import advice
from ..options.config import FreqLossConfig
from ..options.fields import ConfigError
from ..training.messages import describe
from .captions import too_long
from .checkpoint import check_model, in_saved_order, read_state
from .dataset import DataSet, Example, find, split
from .model import image_encoder_of, load
from .outcome import Outcome
from .quality import survey_images
from .settings import USE_SD_SCRIPTS, Settings
from .tracking import tracker_options
from .trainer import Trainer


def train(
    settings: Settings,
    loss: FreqLossConfig,
    *,
    resume: bool = False,
    held_out: list[Example] | None = None,
    title: str = "training",
) -> Outcome:
    """Train a LoRA and write its file.

    Args:
        settings: see `freq_loss_plugin.engine.settings`.
        loss: the options of the frequency loss; with ``dist_match`` = 0 this is plain LoRA training.
        resume: continue from the state that an earlier run with these settings saved.
        held_out: images on which to evaluate the band losses; not trained on.
        title: label of the progress bar.

    Raises:
        ConfigError: settings, data or model cannot be used, or there is no state of this run to resume from.
        NonFiniteLossError: the run has diverged.
    """
    accelerator = make_accelerator(settings)
    loss.check_model(settings.prediction_type, zero_terminal_snr=settings.zero_terminal_snr)
    data, held_out = find(settings), held_out or []
    if settings.validation_split:
        data, validation = split(data, settings.validation_split, settings.seed)
        held_out = [*held_out, *validation]
    for example in data.examples:
        loss.check_size(example.size[1] // 8, example.size[0] // 8)
    if loss.guided:
        data = replace(data, features=_load_features(settings, data.examples, held_out))
    state = read_state(settings, loss, data) if resume else None
    data = data if state is None else in_saved_order(settings, data, state)
    model = load(settings, accelerator.device)
    if state is not None:
        check_model(settings, model.identity, state)
    if data.features is not None:
        clip_features.check_width(data.features, model.text_width, _extraction_command(settings))
    long = too_long((example.caption for example in data.examples), model.pipeline.tokenizer)
    data = replace(data, warnings=[*data.warnings, *long])
    if loss.gated:
        data = replace(data, survey=survey_images(settings, loss, data, model))
    _print_start(settings, loss, data, accelerator, validates=bool(held_out))
    trainer = Trainer(settings, loss, data, model, accelerator)
    if state is not None:
        trainer.restore(state)
    return trainer.run(held_out, title)


def make_accelerator(settings: Settings) -> Accelerator:
    """Make the accelerator of a run.

    Raises:
        ConfigError: several processes, fp16 on a CPU, or a tracker that is not installed.
    """
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(mixed_precision=settings.mixed_precision, **tracker_options(settings))
    if accelerator.num_processes > 1:
        raise ConfigError(f"{accelerator.num_processes} processes: the engine runs in a single one. {USE_SD_SCRIPTS}")
    if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError('mixed_precision = "fp16" needs a GPU; on a CPU use "no" or "bf16"')
    return accelerator


def _print_start(
    settings: Settings, loss: FreqLossConfig, data: DataSet, accelerator: Accelerator, *, validates: bool
) -> None:
    """Print the options in force, the images, and warnings."""
    family = "SD2.x" if settings.v2 else "SD1.x"
    model = f"{family} (prediction type {settings.prediction_type})"
    quality = None if data.survey is None else data.survey.summary
    print("\n".join(describe(loss, model, kohya_format.NETWORK_MODULE, features=data.features, quality=quality)))
    per_epoch = sum(example.repeats for example in data.examples)
    print(f"  {len(data.examples)} images, {per_epoch} per epoch, on {accelerator.device}")
    window = settings.min_timestep, settings.max_timestep
    logs = settings.logging_dir is not None or settings.log_with is not None
    loss_warnings = advice.warnings(loss, settings.train_batch_size, *window, validates=validates, logs=logs)
    quality_warnings = () if data.survey is None else data.survey.warnings
    # What the files are like has been said of all images.
    quality_warnings = [each for each in quality_warnings if not any(note in each for note in image_files.NOTES)]
    for warning in [*data.warnings, *quality_warnings, *loss_warnings]:
        print(f"warning: {warning}")


def _load_features(settings: Settings, examples: list[Example], held_out: list[Example]) -> clip_features.Features:
    """The features of all images; validation images do not count in the mean."""
    weights = {example.file: float(example.repeats) for example in examples}
    weights |= {example.file: 0.0 for example in held_out}
    return clip_features.load(weights, _extraction_command(settings))


def _extraction_command(settings: Settings) -> str:
    return clip_features.extraction_command(
        {"train_data_dir": settings.train_data_dir, "clip": image_encoder_of(settings.pretrained_model_name_or_path)}
    )
