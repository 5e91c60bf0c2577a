"""Asks a trainer of sd-scripts for timesteps: one for a whole batch, or those that are chosen for its samples.

In dev versions of sd-scripts a subset of images can ask for an offset (``timestep_sampling = { offset = -0.5 }``), by
which FLUX and Anima draw its timesteps from another distribution. `coupled_timesteps` keeps these distributions.
"""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.latents import NUM_TRAIN_TIMESTEPS
from freq_loss_plugin.step import separate_random_stream

from .host import OFFSET, OFFSET_SAMPLINGS, CalledFunction, Prediction

_CPU = torch.device("cpu")


class SampleDistributions(NamedTuple):
    """The distributions of a batch whose samples draw their timesteps from different ones.

    Attributes:
        draw: one timestep for each sample, from its own distribution, shape (B,), on the CPU and the scale 0..1000.
        density_ratio: for one timestep per sample, shape (B,), the density of the sample's own distribution over that
            of the base distribution, float64.
    """

    draw: Callable[[], Tensor]
    density_ratio: Callable[[Tensor], Tensor]


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
        args: the arguments of the training; they stay as they are.
        timestep: on the scale 0..1000.
    """
    fixed = copy.copy(args)
    fixed.min_timestep = fixed.max_timestep = timestep
    sigma = timestep / NUM_TRAIN_TIMESTEPS
    _fix_sigma(fixed, sigma / (1 - sigma))
    fixed.model_prediction_type = "raw"
    return fixed


@contextmanager
def choosing_timesteps(prediction: Prediction, drawing: CalledFunction, choose: Choose) -> Iterator[None]:
    """Give the samples of the trainer's passes chosen timesteps, as long as this lasts.

    The trainer's own drawing function is called for the draws, on the CPU and with empty latents of one channel, and
    once more for its result, so that what is drawn after it stays the same.

    Args:
        prediction: what the trainer's model predicts.
        drawing: the trainer's function, see `host.drawing_function`.
        choose: called once in each pass.
    """
    original = drawing.function
    signature = inspect.signature(original)

    def draw_chosen(*arguments: Any, **named: Any) -> Any:
        given = signature.bind(*arguments, **named).arguments
        if prediction == "scheduler":
            return _choose_from_schedule(original, given, choose)
        return _choose_noise_levels(prediction, original, given, choose)

    with drawing.replaced_by(draw_chosen):
        yield


def coupled_timesteps(
    draw: Callable[[int], Tensor], own: SampleDistributions, config: FreqLossConfig, name: str, process: int = 0
) -> tuple[Tensor, float | None, Tensor]:
    """`shared_timesteps` where samples have distributions of their own: as many as possible take the shared timestep.

    The shared timestep t is drawn from the base distribution p, which is that of an offset of 0 and the same in all
    processes. If it is in the window, sample i takes it with probability min(1, p_i(t) / p(t)), which is the maximal
    coupling of both; otherwise it draws from what is left of p_i. So each sample's timestep is distributed as p_i.

    Args:
        draw: n timesteps from the base distribution, as for `shared_timesteps`.
        own: the samples' distributions.
        config: its window is used.
        name: of the random stream.
        process: number of this process.

    Returns:
        Timesteps of shape (B,), the shared one or None, and which samples take it, shape (B,), boolean.
    """

    def inside(timesteps: Tensor) -> Tensor:
        return (timesteps >= config.min_timestep) & (timesteps < config.max_timestep)

    with separate_random_stream(name, _CPU):
        first = draw(1)
    with separate_random_stream(f"{name}:{process}", _CPU):
        timesteps = own.draw()
        chance = torch.rand(len(timesteps), dtype=torch.float64)
        takes = inside(first) & (chance < own.density_ratio(first.expand(len(timesteps))))
        pending = ~takes
        while True:
            # What is left of p_i: outside the window all of it, inside p_i - min(p_i, p).
            chance = torch.rand(len(timesteps), dtype=torch.float64)
            pending &= inside(timesteps) & (chance * own.density_ratio(timesteps) < 1)
            if not pending.any():
                break
            timesteps = torch.where(pending, own.draw(), timesteps)
    shared = first.item() if inside(first).item() else None
    return torch.where(takes, first.expand(len(timesteps)), timesteps), shared, takes


def _choose_from_schedule(original: Callable[..., Tensor], given: dict[str, Any], choose: Choose) -> Tensor:
    timesteps = choose(lambda count: original(**{**given, "b_size": count, "device": _CPU}), given["b_size"], None)
    original(**given)
    return timesteps.to(given["device"], non_blocking=True)


def _choose_noise_levels(
    prediction: Prediction, original: Callable[..., Any], given: dict[str, Any], choose: Choose
) -> tuple[Tensor, ...]:
    """SD3 and the flow trainers calculate with their arguments, which may be tensors (see `at_one_timestep`)."""
    args, latents = given["args"], given["latents"]
    offsets = given.pop(OFFSET, None)

    def draw(count: int, **changes: Any) -> Tensor:
        empty = torch.zeros(count, 1, *latents.shape[2:])
        small = {"latents": empty, "noise": empty, "device": _CPU, "dtype": torch.float32}
        timesteps: Tensor = original(**{**given, **small, **changes})[1]
        return timesteps

    own = None if offsets is None else _with_offsets(draw, args, offsets.double().cpu())
    timesteps = choose(draw, len(latents), own)
    fixed = copy.copy(args)
    if prediction == "sample":
        fixed.min_timestep = fixed.max_timestep = timesteps.long()
    else:
        sigma = (timesteps.float() / NUM_TRAIN_TIMESTEPS).clamp(max=1 - 1e-6)
        _fix_sigma(fixed, (sigma / (1 - sigma)).to(given["device"], non_blocking=True))
    result: tuple[Tensor, ...] = original(**{**given, "args": fixed})
    return result


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
