"""Asks a trainer of musubi-tuner for timesteps: one for a batch, or those chosen for its samples.

A trainer draws t and mixes ``(1 - t)·latents + t·noise`` in one method, which is called for all of this: on the CPU and
with empty latents for draws, and for chosen timesteps with ``min_timestep`` = ``max_timestep``, which may be tensors.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from freq_loss_plugin.training.random_streams import separate_random_stream
from freq_loss_plugin.training.timesteps import Draws

from ..empty_latents import EmptyLatents
from .host import MUSUBI, SCHEDULED

_CPU = torch.device("cpu")

# The trainer's method, and the arguments of a call by name.
Draw = Callable[..., tuple[Tensor, Tensor]]
Given = dict[str, Any]


def on_scale(timesteps: Tensor, args: argparse.Namespace) -> Tensor:
    """Timesteps as a trainer returns them, on the scale 0..1000: 1000·sigma in float32."""
    return timesteps.float() - _offset(args)


def at(method: Draw, given: Given, timesteps: Tensor | float, stream: str) -> tuple[Tensor, Tensor, argparse.Namespace]:
    """Noisy latents at chosen timesteps.

    Args:
        method: the trainer's ``get_noisy_model_input_and_timesteps``.
        given: the arguments of a call of it, by name.
        timesteps: shape (B,), on the scale 0..1000, or one for all.
        stream: names the random stream of what the method draws besides.

    Returns:
        The noisy latents, the timesteps as the trainer returns them, and the arguments of the run that go with them.
    """
    fixed = copy.copy(given["args"])
    fixed.timestep_sampling, fixed.preserve_distribution_shape = "uniform", False
    device = torch.device(given["device"])
    values = torch.as_tensor(timesteps, dtype=torch.float32).to(device, non_blocking=True)
    # The method divides both in place.
    fixed.min_timestep, fixed.max_timestep = values.clone(), values.clone()
    with separate_random_stream(f"{stream}:noisy", device):
        noisy, returned = method(**{**given, "args": fixed, "timesteps": None})
    return noisy, returned, fixed


def check(trainer: Any, args: argparse.Namespace) -> None:
    """Try it on latents of one channel, since nothing says that another version of musubi-tuner works like this one.

    Raises:
        UnsupportedTrainerError: the trainer mixes other noise levels than those asked for.
    """
    method, asked = trainer.get_noisy_model_input_and_timesteps, torch.tensor([100.0, 700.0])
    latents = torch.zeros(2, 1, 8, 8)
    given = {"args": args, "noise": torch.ones_like(latents), "latents": latents, "timesteps": None}
    given |= {"noise_scheduler": None, "device": _CPU, "dtype": torch.float32}
    noisy, returned, fixed = at(method, given, asked, "check")
    mixed = 1000 * noisy.flatten(1).mean(dim=1)
    for found in (mixed, on_scale(returned, fixed)):
        if not torch.allclose(found, asked, atol=0.1):
            looked_for = f"the noise levels {asked.tolist()} with min_timestep = max_timestep in {method.__name__}"
            raise MUSUBI.unsupported(type(trainer), looked_for, str(found.tolist()))


def chosen(method: Draw, given: Given, choose: Callable[[Draws], Tensor], stream: str) -> tuple[Tensor, Tensor]:
    """Noisy latents and timesteps where ``choose`` decides; what the trainer itself would draw is drawn, too.

    Args:
        method: as in `at`.
        given: as in `at`.
        choose: `FrequencyTerm.choose`.
        stream: names the random stream of what this process draws besides.
    """
    size = tuple(given["latents"].shape[2:])
    empty = EmptyLatents.of(len(given["latents"]), size, given["device"])
    own = method(**{**given, "noise": empty, "latents": empty})[1]
    draws = Draws(on_scale(own, given["args"]), lambda count: draw(method, given, count), size)
    noisy, returned, _ = at(method, given, choose(draws), stream)
    return noisy, _as_returned(returned, given).to(own.dtype)


def draw(method: Draw, given: Given, count: int) -> Tensor:
    """``count`` of the timesteps that a trainer draws, shape (count,), on the CPU and the scale 0..1000."""
    empty = EmptyLatents.of(count, given["latents"].shape[2:])
    changed = {"noise": empty, "latents": empty, "timesteps": None, "device": _CPU}
    return on_scale(method(**{**given, **changed})[1], given["args"])


def _offset(args: argparse.Namespace) -> float:
    return 0.0 if args.timestep_sampling == SCHEDULED else 1.0


def _as_returned(timesteps: Tensor, given: Given) -> Tensor:
    """Those of `at`, which adds 1, as the run's own ``timestep_sampling`` would have returned them."""
    return timesteps - (1.0 - _offset(given["args"]))
