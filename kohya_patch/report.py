"""Prints and logs on the main process what a run has to say of the loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from torch import Tensor

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.console import print_any_text
from freq_loss_plugin.guidance_token.features import Features
from freq_loss_plugin.options import advice
from freq_loss_plugin.training.messages import Message, describe

from .image_quality import ImageQuality
from .protocols import Accelerator
from .runs import TrainingRun, is_main_process

logger = logging.getLogger("kohya_patch")


def announce(
    run: TrainingRun,
    config: FreqLossConfig,
    network_module: str,
    features: Features | None = None,
    quality: ImageQuality | None = None,
) -> None:
    """Say once what is on, what it costs, and which settings do little."""
    if not is_main_process():
        return
    args, family = run.args, run.family
    model = f"{family.name} (prediction type {family.prediction_type(args)})"
    summary = None if quality is None else quality.survey.summary
    block = describe(config, model, network_module, features=features, quality=summary)
    print_any_text()
    # Not through logging: the programs' handlers would fold the block into a narrow column.
    print("\n".join(["", *block, ""]), flush=True)
    window = (getattr(args, "min_timestep", None), getattr(args, "max_timestep", None))
    logs = any(getattr(args, name, None) for name in ("logging_dir", "log_with"))
    validates = bool(run.validation_datasets)
    warnings = advice.warnings(config, _smallest_batch(run), *window, validates=validates, logs=logs)
    warn([*(quality.survey.warnings if quality is not None else ()), *warnings])


def warn(warnings: Iterable[str]) -> None:
    """Log warnings on the main process."""
    for warning in warnings if is_main_process() else ():
        logger.warning("freq_loss: %s", warning)


def log_image(accelerator: Accelerator, name: str, draw: Callable[[], Tensor | None], step: int) -> None:
    """Log an image of shape (H, W, 3), 0..1, where a run writes to TensorBoard and has something to draw.

    Raises:
        ImportError: matplotlib is missing.
    """
    if not any(tracker.name == "tensorboard" for tracker in accelerator.trackers):
        return
    image = draw()
    if image is not None:
        writer = accelerator.get_tracker("tensorboard").writer
        writer.add_image(name, image.numpy(), step, dataformats="HWC")


def log(message: Message | None) -> None:
    """Log a message on the main process."""
    if message is not None and is_main_process():
        logger.log(logging.WARNING if message.is_warning else logging.INFO, "freq_loss: %s", message.text)


def _smallest_batch(run: TrainingRun) -> int | None:
    return min(run.batch_sizes, default=getattr(run.args, "train_batch_size", None))
