"""Which of sd-scripts' own weightings of the base loss cannot be combined with ``freq_loss_balance``."""

from __future__ import annotations

import argparse

from freq_loss_plugin import ConfigError, FreqLossConfig

from .. import checks
from .trainers import Family

# Training arguments by which sd-scripts weighs the loss by noise level; the balance would undo or double them.
SCHEDULE_WEIGHTINGS = (
    "min_snr_gamma",
    "debiased_estimation_loss",
    "scale_v_pred_loss_like_noise_pred",
    "v_pred_like_loss",
)


def check(config: FreqLossConfig, args: argparse.Namespace, family: Family) -> None:
    """Raise ConfigError where the trainer already weighs its loss by noise level, or reshapes its prediction."""
    key = f"freq_loss_balance = {config.balance!r}"
    if family.kind == "scheduler":
        given = [name for name in SCHEDULE_WEIGHTINGS if getattr(args, name, None)]
        if given:
            raise ConfigError(
                f"{key} with {given[0]} = {getattr(args, given[0])}: both weigh the loss by noise level, and the "
                f"balance would undo part of the other; remove {given[0]}, or set freq_loss_balance = 'off'"
            )
        return
    checks.check_weighting_scheme(config, args)
    shape = getattr(args, "model_prediction_type", "raw")
    if family.kind == "flow" and shape != "raw":
        raise ConfigError(
            f"{key} with model_prediction_type = {shape!r}: sd-scripts then compares a reshaped prediction with a bare "
            "velocity, whose difference is not a latent-space error; set model_prediction_type = 'raw'"
        )
