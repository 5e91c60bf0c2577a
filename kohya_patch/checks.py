"""What cannot be combined with the plug-in in any training program."""

from __future__ import annotations

import argparse
import os

from freq_loss_plugin import ConfigError, FreqLossConfig


def check_deepspeed(args: argparse.Namespace) -> None:
    """Raise ConfigError where DeepSpeed is on."""
    if getattr(args, "deepspeed", False) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ConfigError(
            "DeepSpeed is on (deepspeed = true, or accelerate's own configuration): it restricts how backward() may be "
            "called, and the frequency loss is untested with it; train without it (several processes work), or set "
            "dist_match = 0 and leave freq_loss_balance and freq_loss_image_quality off"
        )


# Of weighting_scheme, which also names distributions of timesteps; those are fine.
_FLOW_WEIGHTINGS = ("sigma_sqrt", "cosmap")


def check_weighting_scheme(config: FreqLossConfig, args: argparse.Namespace) -> None:
    """Raise ConfigError where a flow trainer's loss would be weighed by noise level twice."""
    scheme = getattr(args, "weighting_scheme", None)
    if config.balanced and scheme in _FLOW_WEIGHTINGS:
        raise ConfigError(
            f"freq_loss_balance = {config.balance!r} with weighting_scheme = {scheme!r}: both weigh the loss by noise "
            "level; set weighting_scheme = 'none' (or a distribution of timesteps such as 'logit_normal'), or "
            "freq_loss_balance = 'off'"
        )


def check_block_swap(config: FreqLossConfig, args: argparse.Namespace) -> None:
    """Raise ConfigError where there would be two passes with swapped blocks."""
    if config.enabled and config.timesteps == "unified" and getattr(args, "blocks_to_swap", None):
        raise ConfigError(
            f"freq_loss_timesteps = 'unified' with blocks_to_swap = {args.blocks_to_swap}: blocks are swapped for one "
            "forward and one backward pass per step, and two are untested; set freq_loss_timesteps = 'shared', or "
            "remove blocks_to_swap"
        )
