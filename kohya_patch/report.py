"""What the hook says: one block at the start, one line after fifty steps, and nothing in between."""

from __future__ import annotations

import argparse
import logging
from dataclasses import fields

from freq_loss_plugin import FreqLossConfig, __version__
from freq_loss_plugin.wavelet_library import INSTALL_HINT

from .trainers import Training

logger = logging.getLogger("kohya_patch")

# Steps after which the mean share of the loss is told, and the bounds outside of which it is a warning.
SHARE_STEPS = 50
SMALL_SHARE, LARGE_SHARE = 0.01, 0.5


def announce(training: Training, config: FreqLossConfig, network_module: str) -> None:
    """Say once, on the main process, what is on, what it costs, and which settings do little."""
    if not _is_main_process():
        return
    # Not through logging: sd-scripts' handler would fold the block into a narrow column.
    print("\n".join(["", *_describe(training, config, network_module), ""]), flush=True)
    for warning in [*config.useless_settings(_smallest_batch(training)), *_window_warnings(config, training.args)]:
        logger.warning("freq_loss: %s", warning)


class ShareReport:
    """Tells the term's mean share of the loss after the first steps, and whether that is too little or too much."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._steps_left = min(SHARE_STEPS, getattr(args, "max_train_steps", None) or SHARE_STEPS)
        self._shares: list[float] = []

    def add(self, share: float) -> None:
        """Note the share of one batch."""
        if self._steps_left > 0:
            self._shares.append(share)

    def after_step(self, step: int) -> None:
        """Count one optimizer step; speaks after the last of the first steps."""
        self._steps_left -= 1
        if self._steps_left != 0 or not self._shares or not _is_main_process():
            return
        mean = sum(self._shares) / len(self._shares)
        message = f"freq_loss: up to step {step} the frequency term was {mean:.2%} of the loss on average"
        if mean < SMALL_SHARE:
            logger.warning(
                "%s, too little to act; multiply dist_match by %.0f for about 10%%", message, _factor_for(0.1, mean)
            )
        elif mean > LARGE_SHARE:
            logger.warning("%s, more than the base loss itself; lower dist_match", message)
        else:
            logger.info(message)
        self._shares.clear()


def _describe(training: Training, config: FreqLossConfig, network_module: str) -> list[str]:
    if not config.enabled:
        return [
            f"freq_loss {__version__}: off (dist_match = 0); {network_module} trains exactly as without the plug-in"
        ]
    keys = {name: key for key, name in FreqLossConfig.fields_by_key().items()}
    shown = {keys[option.name]: getattr(config, option.name) for option in fields(config)}
    shown["freq_loss_network_module"] = network_module
    lines = [f"freq_loss {__version__}: on for {training.family.name} ({_prediction(training)})"]
    lines += [f"  {key} = {value}{_remark(key, config)}" for key, value in shown.items() if _matters(key, config)]
    lines.append(f"  cost: {_cost(config)}")
    return lines


def _prediction(training: Training) -> str:
    return f"prediction type {training.family.prediction_type(training.args)}"


def _remark(key: str, config: FreqLossConfig) -> str:
    if key == "freq_loss_method" and config.resolved_method != config.method:
        return f" → {config.resolved_method}: the wavelet library cannot be imported ({INSTALL_HINT})"
    return ""


def _matters(key: str, config: FreqLossConfig) -> bool:
    """Whether an option has a say under the others."""
    needs_method = {"freq_loss_wavelet": "wavelet", "freq_loss_levels": "wavelet", "freq_loss_cutoff": "fft"}
    if key in needs_method:
        return config.resolved_method == needs_method[key]
    return key != "min_snr_gamma" or config.sample_weights == "min_snr"


def _cost(config: FreqLossConfig) -> str:
    if config.timesteps == "unified":
        return (
            "one extra forward and backward pass per batch, so about twice the time per step and up to twice the "
            "activation memory; freq_loss_timesteps = 'own' needs neither"
        )
    return "no extra pass; a few plain MSEs per batch"


def _window_warnings(config: FreqLossConfig, args: argparse.Namespace) -> list[str]:
    if not config.enabled:
        return []
    first = getattr(args, "min_timestep", None) or 0
    end = getattr(args, "max_timestep", None) or 1000
    if config.min_timestep >= first and config.max_timestep <= end:
        return []
    overlap = range(max(first, config.min_timestep), min(end, config.max_timestep))
    if config.timesteps == "own" and not overlap:
        effect = "no sample is ever inside it, and the term is always 0"
    elif config.timesteps == "own":
        effect = f"only {overlap.start}..{overlap.stop} of it is ever drawn"
    else:
        effect = "the extra pass trains timesteps that the base loss leaves alone"
    return [
        f"the window {config.min_timestep}..{config.max_timestep} (freq_loss_min_timestep, freq_loss_max_timestep) is "
        f"not inside the trainer's own {first}..{end} (min_timestep, max_timestep): {effect}"
    ]


def _smallest_batch(training: Training) -> int | None:
    return min(training.batch_sizes, default=getattr(training.args, "train_batch_size", None))


def _factor_for(wanted: float, share: float) -> float:
    """By how much the term must grow for its share of the loss to be ``wanted``."""
    share = max(share, 1e-12)
    return (wanted / (1 - wanted)) / (share / (1 - share))


def _is_main_process() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process
