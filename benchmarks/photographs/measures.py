r"""What is measured on a trained LoRA; fixed before any arm was trained, see plan.md.

- validation error at (timestep, part): the mean square of a part of prediction - target, on latents of sharp
  photographs in the style that were not trained on, divided by that of the base model. Parts are the low and the high
  band of the loss, and the channel means. ``validation`` is the geometric mean of all; ``validation low`` and so on
  are those of the parts.
- what samples show: spectrum low, high, kernel distance as in `benchmarks.what_helps.measures`; color error is the
  distance between the mean colors of all samples and of all true images. Without captions there is no fidelity.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from assets.make_tiny_flow.features import features_of
from benchmarks.what_helps.measures import BANDS, TIMESTEPS, kernel_distance
from freq_loss_plugin.analysis.spectra import compare_spectra
from freq_loss_plugin.loss.params import BandSpec
from freq_loss_plugin.training.random_streams import named_generator

from . import autoencoders
from .cell import photographs_of
from .worlds import World

MEANS = "means"
PARTS = (*BANDS, MEANS)
VALIDATION = ("validation", *(f"validation {part}" for part in PARTS))
ERRORS = tuple(f"validation {timestep} {part}" for timestep in TIMESTEPS for part in PARTS)
OF_SAMPLES = ("spectrum low", "spectrum high", "kernel distance", "color error")
NAMES = (*VALIDATION, *OF_SAMPLES, *ERRORS)
_SAMPLES, _SAMPLING_STEPS = 24, 10
# As in `benchmarks.what_helps.measures`: a period of 32 pixels is where the bands meet.
_PIXEL_BANDS = BandSpec(levels=4)


class Reference(NamedTuple):
    """What a LoRA of a world, a style and a seed is compared with.

    Attributes:
        errors: of the base model.
        real: true images after the autoencoder.
        features: of these.
    """

    errors: dict[str, float]
    real: Tensor
    features: Tensor


@lru_cache(maxsize=1)
def reference_of(world: World, style: str, seed: int) -> Reference:
    """See above."""
    found = photographs_of(world, style, seed)
    real = autoencoders.decode(world.autoencoder, found.others)
    return Reference(_errors(world, world.load(), found.validation), real, features_of(real))


def validate(world: World, model: nn.Module, style: str, seed: int) -> dict[str, float]:
    """Validation errors relative to the base model."""
    base = reference_of(world, style, seed).errors
    errors = _errors(world, model, photographs_of(world, style, seed).validation)
    ratios = {f"validation {name}": error / base[name] for name, error in errors.items()}
    parts = {part: [value for name, value in ratios.items() if name.endswith(part)] for part in PARTS}
    means = {f"validation {part}": _geometric_mean(values) for part, values in parts.items()}
    return {"validation": _geometric_mean(list(ratios.values())), **means, **ratios}


def judge(world: World, model: nn.Module, style: str, seed: int) -> dict[str, float]:
    """What samples show."""
    reference = reference_of(world, style, seed)
    samples = autoencoders.decode(world.autoencoder, sample(world, model))
    spectra = compare_spectra(samples, reference.real, _PIXEL_BANDS).bands
    colors = [images.mean(dim=(0, 2, 3)) for images in (samples, reference.real)]
    return {
        **{f"spectrum {band.name}": band.distance for band in spectra},
        "kernel distance": kernel_distance(features_of(samples), reference.features),
        "color error": float((colors[0] - colors[1]).norm()),
    }


@torch.no_grad()
def sample(world: World, model: nn.Module) -> Tensor:
    """Latents, shape (n, C, H, W), by Euler's method (flow matching), or DDIM."""
    latents = torch.randn((_SAMPLES, world.channels, 24, 24), generator=named_generator("samples"))
    levels = torch.linspace(1, 0, _SAMPLING_STEPS + 1)
    for now, after in pairwise(levels):
        latents = _step(world, model, latents, float(now), float(after))
    return latents


def _step(world: World, model: nn.Module, latents: Tensor, now: float, after: float) -> Tensor:
    """From one noise level to the next, both 0..1."""
    at = torch.full((len(latents),), 1000 * now if world.flow else 999 * now)
    seen = latents.contiguous(memory_format=torch.channels_last)
    prediction = model(seen, at).sample
    if world.alphas is None:
        return latents + (after - now) * prediction
    signal, goal = (float(world.alphas[int(999 * level)]) if level else 1.0 for level in (now, after))
    clean = (latents - (1 - signal) ** 0.5 * prediction) / signal**0.5
    return goal**0.5 * clean + (1 - goal) ** 0.5 * prediction


@torch.no_grad()
def _errors(world: World, model: nn.Module, latents: Tensor) -> dict[str, float]:
    errors = {}
    for timestep in TIMESTEPS:
        noise = torch.randn(latents.shape, generator=named_generator(f"validation:{timestep}"))
        prediction, target = world.predict(model, latents, torch.full((len(latents),), timestep), noise)
        residual = prediction - target
        parts = (*BandSpec().split(residual), residual.mean(dim=(2, 3)))
        for name, part in zip(PARTS, parts, strict=True):
            errors[f"{timestep} {name}"] = float(part.square().mean())
    return errors


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))
