"""What a training says of the loss: one block at the start, one line after fifty steps, and nothing in between."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

from .config import PREFIX, FreqLossConfig
from .guidance import Features
from .latents import NUM_TRAIN_TIMESTEPS
from .version import __version__
from .wavelet_library import INSTALL_HINT

# Steps after which the mean share of the loss is told, and the bounds outside of which it is a warning.
SHARE_STEPS = 50
SMALL_SHARE, LARGE_SHARE = 0.01, 0.5


def describe(config: FreqLossConfig, model: str, network_module: str, *, features: Features | None = None) -> list[str]:
    """The lines of the block at the start: which options are in force and what they cost.

    Args:
        config: the options.
        model: what is trained, for people: ``SDXL (prediction type epsilon)``.
        network_module: the module that made the network.
        features: those of the guidance token, where it is on.
    """
    token = _describe_token(config, features)
    if not config.enabled and not token:
        return [
            f"freq_loss {__version__}: off (dist_match = 0); {network_module} trains exactly as without the plug-in"
        ]
    if not config.enabled:
        return [f"freq_loss {__version__}: the loss is off (dist_match = 0) for {model}", *token]
    keys = {name: key for key, name in FreqLossConfig.fields_by_key().items()}
    shown = {keys[option.name]: getattr(config, option.name) for option in fields(config)}
    shown["freq_loss_network_module"] = network_module
    lines = [f"freq_loss {__version__}: on for {model}"]
    lines += [f"  {key} = {value}{_remark(key, config)}" for key, value in shown.items() if _matters(key, config)]
    memory = f"; {config.memory} latents per bucket are kept" if config.memory else ""
    balance = (
        "; comparing gradients at the model's output costs about ten plain MSEs more"
        if config.share or config.grad_cosine
        else ""
    )
    lines.append(f"  cost: {_cost(config)}{memory}{balance}")
    return [*lines, *token]


def warnings(
    config: FreqLossConfig,
    batch_size: int | None,
    min_timestep: int | None,
    max_timestep: int | None,
    *,
    validates: bool = True,
    logs: bool = True,
) -> list[str]:
    """One sentence for each setting that does little or nothing in a training with these settings of its own.

    ``validates`` and ``logs`` are whether there are validation pictures, and a tracker such as TensorBoard.
    """
    found = [*config.useless_settings(batch_size), *_window_warnings(config, min_timestep, max_timestep)]
    if config.enabled and config.validation and not validates:
        found.append("freq_loss_validation: there are no validation pictures; set validation_split, for instance 0.1")
    if config.enabled and (config.validation or config.grad_cosine) and not logs:
        found.append(
            "freq_loss_validation and freq_loss_grad_cosine tell what they find in logs alone; set logging_dir"
        )
    return found


class Remark(NamedTuple):
    """A line for the user, and whether it is a warning."""

    text: str
    is_warning: bool


class ShareReport:
    """Finds the term's mean share of the loss over the first steps, and whether that is too little or too much.

    Args:
        max_train_steps: the length of the training, which may be shorter than `SHARE_STEPS`.
        held: the gradients are held at a share, whatever that makes of the losses; there is nothing to warn of.
    """

    def __init__(self, max_train_steps: int | None, *, held: bool = False) -> None:
        self._held = held
        self._steps_left = min(SHARE_STEPS, max_train_steps or SHARE_STEPS)
        self._shares: list[float] = []

    def add(self, share: float) -> None:
        """Note the share of one batch."""
        if self._steps_left > 0:
            self._shares.append(share)

    def after_step(self, step: int) -> Remark | None:
        """Count one optimizer step; returns what there is to say after the last of the first steps, otherwise None."""
        self._steps_left -= 1
        if self._steps_left != 0 or not self._shares:
            return None
        mean = sum(self._shares) / len(self._shares)
        self._shares.clear()
        message = f"up to step {step} the frequency term was {mean:.2%} of the loss on average"
        if self._held:
            return Remark(message, False)
        if mean < SMALL_SHARE:
            factor = _factor_for(0.1, mean)
            return Remark(f"{message}, too little to act; multiply dist_match by {factor:.0f} for about 10%", True)
        if mean > LARGE_SHARE:
            return Remark(f"{message}, more than the base loss itself; lower dist_match", True)
        return Remark(message, False)


def _remark(key: str, config: FreqLossConfig) -> str:
    if key == "dist_match" and config.share:
        return " (for the first batch; then by freq_loss_share)"
    if key == "freq_loss_method" and config.resolved_method != config.method:
        return f" -> {config.resolved_method}: the wavelet library cannot be imported ({INSTALL_HINT})"
    return ""


def _describe_token(config: FreqLossConfig, features: Features | None) -> list[str]:
    if features is None:
        return []
    return [
        f"  guidance_token = {config.guidance_token:g}: on; the last text token of each picture is its CLIP features, "
        f"those of {len(features.by_picture)} pictures by {features.clip}, {features.width} wide; it costs nothing"
    ]


def _matters(key: str, config: FreqLossConfig) -> bool:
    """Whether an option has a say under the others."""
    needs_method = {"freq_loss_wavelet": "wavelet", "freq_loss_levels": "wavelet", "freq_loss_cutoff": "fft"}
    if key in needs_method:
        return config.resolved_method == needs_method[key]
    if key == "freq_loss_memory_decay":
        return config.memory > 0
    if key in ("freq_loss_share", "freq_loss_grad_cosine", "freq_loss_validation"):
        return bool(getattr(config, key.removeprefix(PREFIX)))
    # The guidance token has a line of its own.
    return key != "guidance_token" and (key != "min_snr_gamma" or config.sample_weights == "min_snr")


def _cost(config: FreqLossConfig) -> str:
    if config.timesteps == "unified":
        return (
            "one extra forward and backward pass per batch, so about twice the time per step; one graph is alive at a "
            "time, so no more memory; freq_loss_timesteps = 'shared' needs no extra pass"
        )
    if config.timesteps == "shared":
        return "no extra pass; a few plain MSEs in batches that share a timestep in the window, nothing in the others"
    return "no extra pass; a few plain MSEs per batch"


def _window_warnings(config: FreqLossConfig, min_timestep: int | None, max_timestep: int | None) -> list[str]:
    if not config.enabled:
        return []
    first, end = min_timestep or 0, max_timestep or NUM_TRAIN_TIMESTEPS
    if config.min_timestep >= first and config.max_timestep <= end:
        return []
    overlap = range(max(first, config.min_timestep), min(end, config.max_timestep))
    if config.timesteps != "unified" and not overlap:
        effect = "no sample is ever inside it, and the term is always 0"
    elif config.timesteps != "unified":
        effect = f"only {overlap.start}..{overlap.stop} of it is ever drawn"
    else:
        effect = "the extra pass trains timesteps that the base loss leaves alone"
    return [
        f"the window {config.min_timestep}..{config.max_timestep} (freq_loss_min_timestep, freq_loss_max_timestep) is "
        f"not inside the trainer's own {first}..{end} (min_timestep, max_timestep): {effect}"
    ]


def _factor_for(wanted: float, share: float) -> float:
    """By how much the term must grow for its share of the loss to be ``wanted``."""
    share = max(share, 1e-12)
    return (wanted / (1 - wanted)) / (share / (1 - share))
