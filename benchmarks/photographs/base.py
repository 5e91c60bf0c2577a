"""Trains the base models from scratch on squares out of photographs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, autocast, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from freq_loss_plugin.image_files import open_rgb
from freq_loss_plugin.training.random_streams import named_generator, separate_random_stream

from . import autoencoders, photographs
from .worlds import MODELS, World

STEPS = 5000
_BATCH, _RATE, _WARMUP, _MAX_NORM, _DECAY = 16, 1e-3, 200, 1.0, 0.999
_SQUARES = 8
_SAVE_EVERY = 250


def train_all(worlds: Sequence[World], folder: Path, steps: int) -> None:
    """Train the models one after another; see `train`."""
    torch.set_num_threads(1)
    for world in worlds:
        train(world, folder, steps)


def train(world: World, folder: Path, steps: int) -> None:
    """Train the model of a world and write it to `MODELS` in fp16.

    Args:
        world: what is trained.
        folder: keeps latents and the state, from which an interrupted training continues.
        steps: optimizer steps; the learning rate falls to 0 over them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    learned, held_out = (_latents(world, part, folder) for part in ("learned", "held_out"))
    with separate_random_stream(f"base:{world.name}", torch.device("cpu")):
        model = world.new_model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(_DECAY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    state: dict[str, Any] = {"model": model, "average": average, "optimizer": optimizer}
    file = folder / f"{world.name}.pt"
    first = _restore(state, file)
    losses = []
    for step in range(first, steps):
        optimizer.param_groups[0]["lr"] = _rate(step, steps)
        losses.append(_step(world, model, learned, step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
            saved = {name: part.state_dict() for name, part in state.items()} | {"step": step + 1}
            torch.save(saved, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
            error = _validate(world, average.module, held_out)
            print(f"{world.name} {step + 1}: {np.mean(losses):.4f}, held out {error:.4f}", flush=True)
            losses = []
    MODELS.mkdir(exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in average.module.state_dict().items()}
    save_file(weights, MODELS / f"{world.name}.safetensors")


def _latents(world: World, part: str, folder: Path) -> Tensor:
    """Of `_SQUARES` squares out of each photograph, in fp16; encoded once, and kept."""
    file = folder / f"{world.name}-{part}.pt"
    if not file.is_file():
        files = photographs.base_photographs()[part == "held_out"]
        numbers = np.random.default_rng((71, part == "held_out"))
        latents = [_of_photograph(world, each, numbers) for each in files]
        torch.save(torch.cat(latents), file)
    return torch.load(file)


def _of_photograph(world: World, file: Path, numbers: np.random.Generator) -> Tensor:
    image = open_rgb(file)
    squares = [photographs.random_square(image, numbers) for _ in range(_SQUARES)]
    with autocast("cpu", torch.bfloat16):
        return autoencoders.encode(world.autoencoder, squares).half()


def _rate(step: int, steps: int) -> float:
    """Rises linearly, then falls along a cosine."""
    return _RATE * min(1.0, (step + 1) / _WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2


def _step(world: World, model: nn.Module, learned: Tensor, step: int) -> float:
    """Add the gradient of a batch; returns its loss."""
    generator = named_generator(f"base:{world.name}:{step}")
    latents = learned[torch.randint(len(learned), (_BATCH,), generator=generator)].float()
    loss = _losses(world, model, latents, generator).mean()
    loss.backward()
    return loss.item()


@torch.no_grad()
def _validate(world: World, model: nn.Module, held_out: Tensor) -> float:
    generator = named_generator("held out")
    parts: Sequence[Tensor] = held_out.float().split(_BATCH)
    return float(torch.cat([_losses(world, model, part, generator) for part in parts]).mean())


def _losses(world: World, model: nn.Module, latents: Tensor, generator: torch.Generator) -> Tensor:
    """Shape (B,)."""
    uniform = 1 - torch.rand(len(latents), dtype=torch.float64, generator=generator)
    timesteps = world.draw(uniform, torch.zeros(len(latents)))
    noise = torch.randn(latents.shape, generator=generator)
    prediction, target = world.predict(model, latents, timesteps, noise)
    return (prediction - target).square().mean(dim=(1, 2, 3))


def _restore(state: dict[str, Any], file: Path) -> int:
    """Load what an interrupted training left; returns how many steps it made."""
    if not file.is_file():
        return 0
    saved = torch.load(file)
    for name, part in state.items():
        part.load_state_dict(saved[name])
    return saved["step"]
