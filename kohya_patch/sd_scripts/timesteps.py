"""Asks a trainer of sd-scripts for timesteps: one for a batch, those chosen for its samples, or none below a least.

In dev versions of sd-scripts a subset of images can ask for an offset (``timestep_sampling = { offset = -0.5 }``), by
which FLUX and Anima draw its timesteps from another distribution; see
`freq_loss_plugin.training.timesteps.coupled_timesteps`.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from freq_loss_plugin.loss.latents import NUM_TRAIN_TIMESTEPS
from freq_loss_plugin.training.least_timesteps import draw_above, raised, several_of
from freq_loss_plugin.training.random_streams import separate_random_stream
from freq_loss_plugin.training.timesteps import SampleDistributions

from ..host import CalledFunction
from .host import OFFSET, OFFSET_SAMPLINGS, TrainerKind

_CPU = torch.device("cpu")

# Chooses the timesteps of a batch, shape (B,), on the scale 0..1000; is given how the trainer draws n of them on the
# CPU, B, and the samples' own distributions where they differ from that.
Choose = Callable[[Callable[[int], Tensor], int, SampleDistributions | None], Tensor]


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

    The trainer's own drawing function is called for the draws, on the CPU and with empty latents of one channel, and
    once more for its result, so that what is drawn after it stays the same.

    Args:
        kind: how the trainer's model predicts.
        drawing: the trainer's function, see `host.drawing_function`.
    """

    def __init__(self, kind: TrainerKind, drawing: CalledFunction) -> None:
        self._kind, self._drawing = kind, drawing
        self._signature = inspect.signature(drawing.function)
        self.name = drawing.name

    @contextmanager
    def made_by(self, choose: Choose) -> Iterator[None]:
        """As long as this lasts, ``choose`` decides; it is called once in each pass."""
        original = self._drawing.function

        def draw_chosen(*arguments: Any, **named: Any) -> Any:
            given = self._signature.bind(*arguments, **named).arguments
            if self._kind == "scheduler":
                return _choose_from_schedule(original, given, choose)
            return _choose_noise_levels(self._kind, original, given, choose)

        with self._drawing.replaced_by(draw_chosen):
            yield

    @contextmanager
    def above(self, least: Tensor, stream: str) -> Iterator[list[str]]:
        """As long as this lasts, timesteps below ``least``, shape (B,), are drawn again; yields the calls made."""
        original = self._drawing.function
        calls: list[str] = []

        def draw_above_least(*arguments: Any, **named: Any) -> Any:
            calls.append(self.name)
            given = self._signature.bind(*arguments, **named).arguments
            if self._kind == "scheduler":
                return _raise_in_schedule(original, given, least, stream)
            return _raise_noise_levels(self._kind, original, given, least, stream)

        with self._drawing.replaced_by(draw_above_least):
            yield calls


def _raise_in_schedule(original: Callable[..., Tensor], given: dict[str, Any], least: Tensor, stream: str) -> Tensor:
    timesteps = original(**given)
    draw = several_of(lambda count: original(**{**given, "b_size": count, "device": _CPU}), len(least))
    return raised(timesteps, least, draw_above(draw, least, stream))


def _raise_noise_levels(
    kind: TrainerKind, original: Callable[..., Any], given: dict[str, Any], least: Tensor, stream: str
) -> tuple[Tensor | None, ...]:
    """What the trainer drew, for samples below their least timestep replaced by the same at a timestep above it."""
    drawn: tuple[Any, ...] = original(**given)
    draw, per_sample = _draws(original, given)
    redraw = several_of(draw, len(least)) if per_sample is None else lambda: per_sample.draw()[None]
    above = draw_above(redraw, least, stream)
    fixed = _at_noise_levels(kind, given["args"], above, given["device"])
    with separate_random_stream(f"{stream}:noise", torch.device(given["device"])):
        replaced: tuple[Any, ...] = original(**{**_without_offsets(given), "args": fixed})
    below = drawn[1] < least.to(drawn[1].device, non_blocking=True)
    # Early versions return no sigma but where ``timestep_sampling`` is "sigma", which the replacement's is not.
    sigma = (above.float() / NUM_TRAIN_TIMESTEPS).to(below.device, non_blocking=True)

    def choose(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        if one is None:
            return None
        shape = (-1, *(1,) * (one.ndim - 1))
        return torch.where(below.view(shape), sigma.view(shape).to(one.dtype) if other is None else other, one)

    return tuple(map(choose, drawn, replaced))


def _choose_from_schedule(original: Callable[..., Tensor], given: dict[str, Any], choose: Choose) -> Tensor:
    timesteps = choose(lambda count: original(**{**given, "b_size": count, "device": _CPU}), given["b_size"], None)
    original(**given)
    return timesteps.to(given["device"], non_blocking=True)


def _choose_noise_levels(
    kind: TrainerKind, original: Callable[..., Any], given: dict[str, Any], choose: Choose
) -> tuple[Tensor, ...]:
    """SD3 and the flow trainers calculate with their arguments, which may be tensors (see `at_one_timestep`)."""
    draw, per_sample = _draws(original, given)
    timesteps = choose(draw, len(given["latents"]), per_sample)
    fixed = _at_noise_levels(kind, given["args"], timesteps, given["device"])
    result: tuple[Tensor, ...] = original(**{**_without_offsets(given), "args": fixed})
    return result


def _draws(
    original: Callable[..., Any], given: dict[str, Any]
) -> tuple[Callable[[int], Tensor], SampleDistributions | None]:
    """How the trainer draws timesteps, and the samples' own distributions where they differ from that."""
    args, shape, offsets = given["args"], given["latents"].shape[2:], given.get(OFFSET)

    def draw(count: int, **changes: Any) -> Tensor:
        empty = torch.zeros(count, 1, *shape)
        small = {"latents": empty, "noise": empty, "device": _CPU, "dtype": torch.float32}
        timesteps: Tensor = original(**{**_without_offsets(given), **small, **changes})[1]
        return timesteps

    return draw, None if offsets is None else _with_offsets(draw, args, offsets.double().cpu())


def _without_offsets(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != OFFSET}


def _at_noise_levels(kind: TrainerKind, args: argparse.Namespace, timesteps: Tensor, device: Any) -> argparse.Namespace:
    """A copy of ``args`` with which each sample of the batch gets its own timestep, those of shape (B,)."""
    fixed = copy.copy(args)
    if kind == "sample":
        fixed.min_timestep = fixed.max_timestep = timesteps.long()
    else:
        sigma = (timesteps.float() / NUM_TRAIN_TIMESTEPS).clamp(max=1 - 1e-6)
        _fix_sigma(fixed, (sigma / (1 - sigma)).to(device, non_blocking=True))
    return fixed


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

    with separate_random_stream("constant", _CPU):  # leaves the trainer's own random numbers alone
        constant = logit(draw(1, args=unscaled))

    def density_ratio(timesteps: Tensor) -> Tensor:
        normal = (logit(timesteps) - constant) / scale
        return torch.exp(offsets * normal - offsets**2 / 2)

    return SampleDistributions(lambda: draw(len(offsets), **{OFFSET: offsets}), density_ratio)


def _fix_sigma(args: argparse.Namespace, shift: Tensor | float) -> None:
    """Make the flow trainers use sigma = shift / (1 + shift)."""
    args.timestep_sampling = "shift"
    args.sigmoid_scale = 0.0
    args.discrete_flow_shift = shift
