"""Says on sd-scripts' main process what `freq_loss_plugin.report` has to say."""

from __future__ import annotations

import logging

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.guidance import Features
from freq_loss_plugin.report import Remark, describe, warnings

from .trainers import Training, is_main_process

logger = logging.getLogger("kohya_patch")

TWO_GRAPHS = Remark(
    "under DeepSpeed both passes of unified are propagated together, so up to twice the activation memory; "
    "freq_loss_timesteps = 'shared' needs no extra pass",
    True,
)


def announce(training: Training, config: FreqLossConfig, network_module: str, features: Features | None = None) -> None:
    """Say once what is on, what it costs, and which settings do little."""
    if not is_main_process():
        return
    args, family = training.args, training.family
    model = f"{family.name} (prediction type {family.prediction_type(args)})"
    # Not through logging: sd-scripts' handler would fold the block into a narrow column.
    print("\n".join(["", *describe(config, model, network_module, features=features), ""]), flush=True)
    window = (getattr(args, "min_timestep", None), getattr(args, "max_timestep", None))
    logs = any(getattr(args, name, None) for name in ("logging_dir", "log_with"))
    for warning in warnings(config, _smallest_batch(training), *window, validates=training.validates, logs=logs):
        logger.warning("freq_loss: %s", warning)


def tell(remark: Remark | None) -> None:
    """Log a remark on the term's share of the loss."""
    if remark is not None and is_main_process():
        logger.log(logging.WARNING if remark.is_warning else logging.INFO, "freq_loss: %s", remark.text)


def _smallest_batch(training: Training) -> int | None:
    return min(training.batch_sizes, default=getattr(training.args, "train_batch_size", None))
