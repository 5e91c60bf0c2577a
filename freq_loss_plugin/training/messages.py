"""What a run prints about the loss: one block at the start, one line after fifty steps, and nothing in between."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

from ..guidance_token.features import Features
from ..loss.wavelet_library import INSTALL_HINT
from ..options.config import FreqLossConfig
from ..options.image_rules import KEY as IMAGE_RULES
from ..options.keys import PREFIX
from ..version import __version__

# Steps after which the mean fraction of the loss is reported, and the bounds outside of which it is a warning.
REPORT_STEPS = 50
SMALL_FRACTION, LARGE_FRACTION = 0.01, 0.5


def describe(
    config: FreqLossConfig,
    model: str,
    network_module: str,
    *,
    features: Features | None = None,
    quality: str | None = None,
) -> list[str]:
    """The lines of the block at the start: which options are in force and what they cost.

    Args:
        config: the options.
        model: what is trained, human-readable: ``SDXL (prediction type epsilon)``.
        network_module: the module that made the network.
        features: those of the guidance token, where it is on.
        quality: what was found of the images' quality, one line, where they train by it.
    """
    token = _describe_token(config, features)
    if not config.changes_training and not token:
        return [
            f"freq_loss {__version__}: off (dist_match = 0); {network_module} trains exactly as without the plug-in"
        ]
    if not config.changes_training:
        return [f"freq_loss {__version__}: the loss is off (dist_match = 0) for {model}", *token]
    keys = {name: key for key, name in FreqLossConfig.fields_by_key().items()}
    shown = {keys[option.name]: getattr(config, option.name) for option in fields(config)}
    shown["freq_loss_network_module"] = network_module
    lines = [f"freq_loss {__version__}: {_state(config)} for {model}"]
    lines += [f"  {key} = {value}{_remark(key, config)}" for key, value in shown.items() if _matters(key, config)]
    balance = (
        "; comparing gradients at the model's output costs about ten plain MSEs more"
        if config.gradient_ratio or config.grad_cosine
        else ""
    )
    if config.enabled:
        lines.append(f"  cost: {_cost(config)}{balance}")
    if config.balanced:
        lines.append("  cost of the balance: a few plain MSEs per batch; its weights follow the run, and begin at 1")
    if quality is not None:
        lines.append(f"  {quality}; this costs milliseconds per batch")
    return [*lines, *token]


def _state(config: FreqLossConfig) -> str:
    if config.enabled:
        return "on"
    others = {"a balanced base loss": config.balanced, "images trained by their quality": config.gated}
    return f"no frequency term (dist_match = 0), and {' and '.join(name for name, on in others.items() if on)},"


class Message(NamedTuple):
    """A line for the user, and whether it is a warning."""

    text: str
    is_warning: bool


class FractionReport:
    """Finds the term's mean fraction of the loss over the first steps, and whether that is too little or too much.

    Args:
        max_train_steps: the length of the run, which may be shorter than `REPORT_STEPS`.
        ratio_is_fixed: the gradient ratio is held, whatever that makes of the losses, so there is nothing to warn of.
    """

    def __init__(self, max_train_steps: int | None, *, ratio_is_fixed: bool = False) -> None:
        self._ratio_is_fixed = ratio_is_fixed
        self._steps_left = min(REPORT_STEPS, max_train_steps or REPORT_STEPS)
        self._fractions: list[float] = []

    def add_step(self, step: int, fraction: float) -> Message | None:
        """Note the fraction in one optimizer step; what there is to say after the last of the first steps, or None."""
        self._steps_left -= 1
        if self._steps_left < 0:
            return None
        self._fractions.append(fraction)
        if self._steps_left:
            return None
        mean = sum(self._fractions) / len(self._fractions)
        text = f"up to step {step} the frequency term was {mean:.2%} of the loss on average"
        if self._ratio_is_fixed:
            return Message(text, False)
        if mean < SMALL_FRACTION:
            factor = _factor_for(0.1, mean)
            return Message(f"{text}, too little to act; multiply dist_match by {factor:.0f} for about 10%", True)
        if mean > LARGE_FRACTION:
            return Message(f"{text}, more than the base loss itself; lower dist_match", True)
        return Message(text, False)


def _remark(key: str, config: FreqLossConfig) -> str:
    if key == "dist_match" and config.gradient_ratio:
        return " (scaled by freq_loss_gradient_ratio)"
    if key == "freq_loss_method" and config.resolved_method != config.method:
        return f" -> {config.resolved_method}: the wavelet library cannot be imported ({INSTALL_HINT})"
    return ""


def _describe_token(config: FreqLossConfig, features: Features | None) -> list[str]:
    if features is None:
        return []
    return [
        f"  guidance_token = {config.guidance_token:g}: on; the last text token of each image is its CLIP features, "
        f"those of {len(features.by_image)} images by {features.clip}, {features.width} wide; it costs nothing"
    ]


def _matters(key: str, config: FreqLossConfig) -> bool:
    """Whether an option matters under the others."""
    needs_method = {"freq_loss_wavelet": "wavelet", "freq_loss_levels": "wavelet", "freq_loss_cutoff": "fft"}
    if key in ("freq_loss_balance", "freq_loss_balance_power"):
        return config.balanced
    if key in ("freq_loss_image_quality", "freq_loss_image_quality_threshold"):
        return config.image_quality != "off"
    if key == IMAGE_RULES:
        return bool(config.image_rules)
    splits = config.enabled or config.balance == "band"
    if key in needs_method:
        return splits and config.resolved_method == needs_method[key]
    if not config.enabled:
        return key == "freq_loss_network_module" or (key == "freq_loss_method" and splits)
    if key in ("freq_loss_gradient_ratio", "freq_loss_grad_cosine", "freq_loss_validation"):
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


def _factor_for(wanted: float, fraction: float) -> float:
    """By how much the term must grow to be the fraction ``wanted`` of the loss."""
    fraction = max(fraction, 1e-12)
    return (wanted / (1 - wanted)) / (fraction / (1 - fraction))
