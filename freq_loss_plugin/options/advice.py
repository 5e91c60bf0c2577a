"""Settings that are allowed and do little or nothing, one sentence for each."""

from __future__ import annotations

from ..loss.latents import NUM_TRAIN_TIMESTEPS
from .config import FreqLossConfig


def warnings(
    config: FreqLossConfig,
    batch_size: int | None,
    min_timestep: int | None,
    max_timestep: int | None,
    *,
    validates: bool = True,
    logs: bool = True,
) -> list[str]:
    """One sentence for each setting that does little or nothing in a run with these settings of the trainer.

    ``validates`` and ``logs`` are whether there are validation images, and a tracker such as TensorBoard.
    """
    found = [*useless_settings(config, batch_size), *_window_warnings(config, min_timestep, max_timestep)]
    if not config.gated and config.image_quality_threshold != FreqLossConfig.image_quality_threshold:
        found.append("freq_loss_image_quality_threshold does nothing without freq_loss_image_quality = 'auto'")
    if config.enabled and config.validation and not validates:
        found.append("freq_loss_validation: there are no validation images; set validation_split, for instance 0.1")
    if config.enabled and (config.validation or config.grad_cosine) and not logs:
        found.append("freq_loss_validation and freq_loss_grad_cosine only write to logs; set logging_dir")
    return found


def useless_settings(config: FreqLossConfig, batch_size: int | None = None) -> list[str]:
    """One sentence for each setting that is allowed and does little or nothing."""
    if not config.enabled:
        keys = {"freq_loss_gradient_ratio": config.gradient_ratio, "freq_loss_grad_cosine": config.grad_cosine}
        wanted = [key for key, value in {**keys, "freq_loss_validation": config.validation}.items() if value]
        if not wanted:
            return []
        return [
            f"dist_match = 0 turns the loss off, and with it {', '.join(wanted)}; give dist_match a value above 0 "
            "(with freq_loss_gradient_ratio, which one does not matter), or remove them"
        ]
    found = []
    if config.low_weight == config.high_weight == 0:
        found.append("freq_loss_low_weight and freq_loss_high_weight are both 0: the term is always 0")
    elif config.low_weight == config.high_weight:
        exact = "is" if config.resolved_method == "fft" else "is nearly"
        found.append(
            f"freq_loss_low_weight = freq_loss_high_weight: the term {exact} the plain MSE of the batch "
            f"{config.reduction}, and the bands do nothing; give them different weights"
        )
    if batch_size == 1:
        found.append(
            "batch size 1: there is no distribution to match, the term is a band-weighted MSE of one image; "
            "a train_batch_size of 4 or more is what the method is made for"
        )
    return found


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
