"""Asks a trainer of sd-scripts for timesteps: one for a batch, or those chosen for its samples.

In dev versions of sd-scripts a subset of images can ask for an offset (``timestep_sampling = { offset = -0.5 }``), by
which FLUX and Anima draw its timesteps from another distribution; see
`freq_loss_plugin.training.timesteps.coupled_timesteps`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from freq_loss_plugin.loss.latents import NUM_TRAIN_TIMESTEPS
from freq_loss_plugin.training.random_streams import separate_random_stream
from freq_loss_plugin.training.timesteps import Draws, SampleDistributions

from ..empty_latents import EmptyLatents
from ..host import CalledFunction
from .host import OFFSET, OFFSET_SAMPLINGS, TrainerKind

_CPU = torch.device("cpu")

# Chooses the timesteps of a batch, shape (B,), on the scale 0..1000.
Choose = Callable[[Draws], Tensor]


def at_one_timestep(args: argparse.Namespace, timestep: int) -> argparse.Namespace:
    """A copy of ``args`` with which every trainer gives each sample of the batch the same timestep.

    - SD1/2, SDXL and SD3 draw from ``min_timestep``..``max_timestep``; sd-scripts' own validation sets both alike.
    - The flow trainers draw sigma. With ``timestep_sampling = "shift"`` it is x·shift / (1 + (shift - 1)·x) where
      x = sigmoid(sigmoid_scale·(normal + offset)). A sigmoid_scale of 0 makes x = 1/2 and sigma = shift / (1 + shift),
      whatever offset a subset asks for, so that shift = s / (1 - s) gives sigma = s.
    - They also reshape the prediction by ``model_prediction_type``; ``raw`` leaves the velocity as it is.

    Args:
        args: the arguments of the run; they stay as they are.
        timestep: on the scale 0..1000.
    """
    fixed = copy.copy(args)
    fixed.min_timestep = fixed.max_timestep = timestep
    sigma = timestep / NUM_TRAIN_TIMESTEPS
    _fix_sigma(fixed, sigma / (1 - sigma))
    fixed.model_prediction_type = "raw"
    return fixed


class TimestepChoice:
    """Makes a trainer's passes use chosen timesteps.

    The trainer's own drawing function is called with empty latents for what it would draw by itself, and once more, in
    a random stream of its own, for the result at the chosen timesteps. So its random numbers are used up as ever, and a
    sample that keeps its timestep also keeps its noise. With ``ip_noise_gamma`` it also draws noise of its own, and is
    called with the latents themselves.

    Args:
        kind: how the trainer's model predicts.
        drawing: the trainer's function, see `host.drawing_function`.
    """

    def __init__(self, kind: TrainerKind, drawing: CalledFunction) -> None:
        self._kind, self._drawing = kind, drawing
        self._signature = inspect.signature(drawing.function)
        self.name = drawing.name

    @contextmanager
    def made_by(self, choose: Choose, stream: str) -> Iterator[list[Tensor]]:
        """As long as this lasts, ``choose`` decides; yields what it chose, one entry for each call.

        Args:
            choose: is called once in each pass.
            stream: names the random stream of what else the trainer draws then.
        """
        original = self._drawing.function
        chosen: list[Tensor] = []

        def draw_chosen(*arguments: Any, **named: Any) -> Any:
            given = self._signature.bind(*arguments, **named).arguments
            if self._kind == "scheduler":
                chosen.append(choose(_schedule_draws(original, given)))
                return chosen[-1].to(given["device"], non_blocking=True)
            # SD3 draws on the CPU, and calculates with its limits there.
            device = _CPU if self._kind == "sample" else given["device"]
            perturbed = bool(getattr(given["args"], "ip_noise_gamma", None))
            own = original(**given if perturbed else _empty(given, len(given["latents"]), device))
            chosen.append(choose(_noise_level_draws(original, given, own)))
            results = _at_noise_levels(self._kind, original, given, own, chosen[-1], stream)
            return _kept(own, results, chosen[-1]) if perturbed else results

        with self._drawing.replaced_by(draw_chosen):
            yield chosen


def _schedule_draws(original: Callable[..., Tensor], given: dict[str, Any]) -> Draws:
    def draw(count: int) -> Tensor:
        return original(**{**given, "b_size": count, "device": _CPU})

    return Draws(original(**given), draw)


def _noise_level_draws(original: Callable[..., Any], given: dict[str, Any], own: tuple[Tensor | None, ...]) -> Draws:
    args, size, offsets = given["args"], tuple(given["latents"].shape[2:]), given.get(OFFSET)

    def draw(count: int, **changes: Any) -> Tensor:
        timesteps: Tensor = original(**{**_without_offsets(_empty(given, count, _CPU)), **changes})[1]
        return timesteps

    timesteps = own[1]
    assert timesteps is not None
    return Draws(timesteps, draw, size, None if offsets is None else _with_offsets(draw, args, offsets.double().cpu()))


def _empty(given: dict[str, Any], count: int, device: Any) -> dict[str, Any]:
    """The same arguments for ``count`` empty latents, and for timesteps that are not rounded to half precision."""
    empty = EmptyLatents.of(count, given["latents"].shape[2:], device)
    return {**given, "latents": empty, "noise": empty, "device": device, "dtype": torch.float32}


def _at_noise_levels(
    kind: TrainerKind,
    original: Callable[..., Any],
    given: dict[str, Any],
    own: tuple[Tensor | None, ...],
    timesteps: Tensor,
    stream: str,
) -> tuple[Tensor | None, ...]:
    """What the trainer's function returns at these timesteps; it calculates with its arguments, which may be tensors.

    Early versions return no sigma but where ``timestep_sampling`` is "sigma", and have "shift" for this.
    """
    device = torch.device(given["device"])
    fixed = copy.copy(given["args"])
    sigma = (timesteps.float() / NUM_TRAIN_TIMESTEPS).to(device, non_blocking=True)
    if kind == "sample":
        fixed.min_timestep = fixed.max_timestep = timesteps.long()
    else:
        within = sigma.clamp(max=1 - 1e-6)
        _fix_sigma(fixed, within / (1 - within))
    with separate_random_stream(f"{stream}:noisy", device):
        noisy, returned, sigmas = original(**{**_without_offsets(given), "args": fixed})
    if own[2] is not None and sigmas is None:
        sigmas = sigma.view(own[2].shape).to(given["dtype"])
    return noisy, returned, None if own[2] is None else sigmas


def _without_offsets(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != OFFSET}


def _with_offsets(draw: Callable[..., Tensor], args: argparse.Namespace, offsets: Tensor) -> SampleDistributions | None:
    """The distributions of samples whose subsets ask for an offset; None where sd-scripts does not heed it.

    logit(sigma) = sigmoid_scale * (normal + offset) + constant, where the constant is what a sigmoid_scale of 0 leaves.
    """
    scale = args.sigmoid_scale
    if args.timestep_sampling not in OFFSET_SAMPLINGS or not scale:
        return None
    unscaled = argparse.Namespace(**{**vars(args), "sigmoid_scale": 0.0})

    def logit(timesteps: Tensor) -> Tensor:
        return torch.logit(timesteps.double() / NUM_TRAIN_TIMESTEPS, eps=1e-7)

    @functools.cache
    def constant() -> Tensor:
        with separate_random_stream("constant", _CPU):  # leaves the trainer's own random numbers alone
            return logit(draw(1, args=unscaled))

    def density_ratio(timesteps: Tensor) -> Tensor:
        normal = (logit(timesteps) - constant()) / scale
        return torch.exp(offsets * normal - offsets**2 / 2)

    def draw_kind(offset: Any, count: int) -> Tensor:
        return draw(count, **{OFFSET: torch.full((count,), offset, dtype=torch.float64)})

    return SampleDistributions(
        lambda: draw(len(offsets), **{OFFSET: offsets}), density_ratio, offsets.tolist(), draw_kind
    )


def _kept(own: tuple[Any, ...], results: tuple[Any, ...], chosen: Tensor) -> tuple[Any, ...]:
    """What the trainer drew by itself for samples that keep their timesteps, and the results for the others."""
    keeps = own[1] == chosen.to(own[1].device, non_blocking=True)

    def choose(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        if one is None or other is None:
            return other
        return torch.where(keeps.view(-1, *(1,) * (one.ndim - 1)), one, other)

    return tuple(map(choose, own, results))


def _fix_sigma(args: argparse.Namespace, shift: Tensor | float) -> None:
    """Make the flow trainers use sigma = shift / (1 + shift)."""
    args.timestep_sampling = "shift"
    args.sigmoid_scale = 0.0
    args.discrete_flow_shift = shift
