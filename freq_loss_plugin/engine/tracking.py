"""Logging through accelerate's trackers."""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from ..options.fields import ConfigError
from .settings import Settings


class Tracking:
    """Logs to TensorBoard or W&B; does nothing without ``logging_dir`` and ``log_with``.

    Args:
        accelerator: made with the options of `tracker_options`.
        settings: the training settings; ``output_name`` is the name of the project.
    """

    def __init__(self, accelerator: Accelerator, settings: Settings) -> None:
        self._accelerator = accelerator
        self.is_on = bool(accelerator.log_with)
        if self.is_on:
            accelerator.init_trackers(_run_name(settings))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers by name."""
        if self.is_on:
            self._accelerator.log(dict(values), step=step)

    def log_image(self, name: str, image: Tensor | None, step: int) -> None:
        """Log an image of shape (H, W, 3), 0..1, where there is one."""
        if image is None:
            return
        for tracker in self._accelerator.trackers if self.is_on else ():
            if tracker.name == "tensorboard":
                tracker.writer.add_image(name, image.numpy(), step, dataformats="HWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [image.numpy()]}, step=step)

    def close(self) -> None:
        """Flush and close the trackers."""
        if self.is_on:
            self._accelerator.end_training()


def _run_name(settings: Settings) -> str:
    """A project of W&B; for TensorBoard a folder of this run alone, since curves in one folder become one curve."""
    if settings.log_with == "wandb":
        return settings.output_name
    folder = Path(settings.logging_dir or settings.output_dir)
    started = time.strftime("%Y%m%d-%H%M%S")
    suffixes = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (f"{settings.output_name}/{started}{suffix}" for suffix in suffixes)
    return next(name for name in names if not (folder / name).exists())


def tracker_options(settings: Settings) -> dict[str, str | Path | None]:
    """The arguments of `Accelerator` that set up the tracker.

    Raises:
        ConfigError: the package of the tracker is not installed.
    """
    if settings.logging_dir is None and settings.log_with is None:
        return {}
    tracker = settings.log_with or "tensorboard"
    if importlib.util.find_spec(tracker) is None:
        raise ConfigError(f"log_with = {tracker!r} is not installed: pip install {tracker}, or remove the line")
    return {"log_with": tracker, "project_dir": settings.logging_dir or settings.output_dir}
