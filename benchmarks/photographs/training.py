"""Trains a LoRA. Arms with one seed and as many images see the same batches, noise and draws of timesteps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from diffusers.optimization import get_scheduler
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.training.passes import Pass
from freq_loss_plugin.training.random_streams import named_generator, separate_random_stream
from freq_loss_plugin.training.term import FrequencyTerm

from .arms import OFF
from .worlds import World

RANK, BATCH, MAX_NORM = 16, 4, 1.0
# The linear layers of attention, and the convolutions of residual blocks and between resolutions.
_TARGETS = r".*\.(to_[qkv]|to_out\.0|conv1|conv2|conv_shortcut|conv)"


def new_lora(world: World, seed: int) -> nn.Module:
    """The base model with a LoRA whose initial weights follow from ``seed``."""
    model = world.load()
    with separate_random_stream(f"lora:{seed}", torch.device("cpu")):
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=float(RANK), target_modules=_TARGETS), model)
    return model.to(memory_format=torch.channels_last)


class Settings(NamedTuple):
    """How a run trains.

    Attributes:
        seed: of batches, noise and timesteps.
        steps: optimizer steps.
        rate: the peak learning rate; it falls along a cosine.
        weighted: whether losses are weighted by `share_weights`.
        config: of the distribution term.
    """

    seed: int
    steps: int
    rate: float
    weighted: bool
    config: FreqLossConfig = OFF


class Training:
    """A run.

    Args:
        world: whose model it is.
        model: its LoRA is trained.
        latents: of the images, shape (n, C, H, W).
        least: the least timestep of each, shape (n,).
        settings: see there.
    """

    def __init__(self, world: World, model: nn.Module, latents: Tensor, least: Tensor, settings: Settings) -> None:
        self._world, self._model, self._latents, self._least = world, model, latents, least
        self._settings, steps = settings, settings.steps
        self._batches = _batches(len(latents), steps, settings.seed)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=settings.rate)
        self._term = FrequencyTerm(settings.config, world.prediction_type, seed=settings.seed)
        self._schedule = get_scheduler("cosine", self._optimizer, num_warmup_steps=0, num_training_steps=steps)

    def run(self) -> None:
        """Train to the end. A LoRA that is not finite then is set to zero, which leaves the base model."""
        for number, chosen in enumerate(self._batches):
            self._loss(number, chosen).backward()
            self._term.settle(number + 1)
            torch.nn.utils.clip_grad_norm_(self._parameters, MAX_NORM)
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()
        if not all(parameter.isfinite().all() for parameter in self._parameters):
            for parameter in self._parameters:
                parameter.data.zero_()

    def _loss(self, number: int, chosen: Tensor) -> Tensor:
        plan = self._term.plan()
        if plan.extra is not None:
            noise = torch.randn(self._latents[chosen].shape, generator=named_generator(plan.stream))
            extra = self._pass(chosen, torch.full((len(chosen),), plan.extra), noise)
            self._term.extra_pass(extra._replace(timesteps=plan.extra), Tensor.backward)
        generator = named_generator(f"step:{self._settings.seed}:{number}")
        noise = torch.randn(self._latents[chosen].shape, generator=generator)
        timesteps = draw(self._world, self._least[chosen], generator)
        passed = self._pass(chosen, timesteps, noise)
        losses = (passed.prediction - passed.target).square().mean(dim=(1, 2, 3))
        if self._settings.weighted:
            losses = losses * share_weights(self._world, timesteps, self._least).to(losses)
        return self._term.join(passed, losses.mean())

    def _pass(self, chosen: Tensor, timesteps: Tensor, noise: Tensor) -> Pass:
        prediction, target = self._world.predict(self._model, self._latents[chosen], timesteps, noise)
        return Pass(prediction, target, timesteps, self._world.alphas)


def draw(world: World, least: Tensor, generator: torch.Generator) -> Tensor:
    """Timesteps as trainers draw them; those below the least timestep of their image are drawn again, above it."""
    uniform = 1 - torch.rand(2, len(least), dtype=torch.float64, generator=generator)
    timesteps = world.draw(uniform[0], torch.zeros(len(least)))
    return torch.where(timesteps < least, world.draw(uniform[1], least), timesteps)


def share_weights(world: World, timesteps: Tensor, least: Tensor) -> Tensor:
    r"""Weights that give each noise level the share of the loss that it has where no image has a least timestep.

    .. math:: w(t) = 1 \Big/ \operatorname{mean}_i \frac{1[t \ge L_i]}{P(t \ge L_i)}

    is the density of t without floors over that with them, so its mean over what is drawn is 1.

    Args:
        world: how timesteps are drawn.
        timesteps: t, shape (B,).
        least: L of all images, shape (n,).
    """
    drawn = (timesteps[:, None] >= least) / world.share(least)
    return 1 / drawn.mean(dim=1)


def _batches(count: int, steps: int, seed: int) -> Tensor:
    """Places of images, shape (steps, BATCH): all of them in random order, again and again."""
    generator = named_generator(f"batches:{seed}")
    epochs = math.ceil(steps * BATCH / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return order[: steps * BATCH].view(steps, BATCH)
