"""Trains a LoRA on the toy model in one arm of the study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from arms import Arm
from diffusers.optimization import get_scheduler
from torch import Tensor

from freq_loss_plugin.engine.dataset import Batches, Example
from freq_loss_plugin.engine.model import Model
from freq_loss_plugin.training.gradient_balance import mse_gradient
from freq_loss_plugin.training.passes import Pass
from freq_loss_plugin.training.timesteps import Draws

BATCH, LEARNING_RATE, MAX_NORM = 4, 4e-3, 1.0


class ArmTraining:
    """A training run of ``steps`` optimizer steps (times the arm's length).

    The order of the images, their noise and their timesteps depend on ``seed`` and the number of the step alone, so
    two arms with the same seed see the same batches.

    Args:
        model: its LoRA is trained.
        arm: what is added to plain MSE.
        latents: of the training images, shape (n, 4, h, w).
        captions: of the training images.
        seed: see above.
        steps: optimizer steps.
    """

    def __init__(self, model: Model, arm: Arm, latents: Tensor, captions: list[str], *, seed: int, steps: int) -> None:
        self._model, self._arm, self._latents, self._captions, self._seed = model, arm, latents, captions, seed
        self._length = steps * arm.length
        self._parameters = model.trainable("lora_unet")
        self._optimizer = torch.optim.AdamW(self._parameters, lr=LEARNING_RATE)
        self._schedule = get_scheduler("cosine", self._optimizer, num_warmup_steps=0, num_training_steps=self._length)
        examples = [Example(Path(str(number)), caption, 1, (128, 128)) for number, caption in enumerate(captions)]
        self._batches = Batches(examples, BATCH, seed)
        self._alphas = model.scheduler.alphas_cumprod.to(latents.device)
        self._chosen: list[int] = []
        self._term = arm.new_term(seed, lambda: latents[self._chosen])

    def run(self) -> list[float]:
        """Train; returns the ratio of the two gradient norms at the model's output, for each batch with a term."""
        return [ratio for number in range(self._length) if (ratio := self._step(number)) is not None]

    def _step(self, number: int) -> float | None:
        self._chosen = self._batches[number]
        plan = self._term.plan()
        extra = None
        if plan.extra is not None:
            extra = self._pass(plan.extra, self._generator("unified", number))
            self._term.extra_pass(extra, Tensor.backward)
        generator = self._generator("base", number)
        timesteps = torch.randint(1000, (len(self._chosen),), generator=generator)
        if plan.chooses:
            timesteps = self._term.choose(Draws(timesteps, lambda count: torch.randint(1000, (count,))))
        base = self._pass(timesteps, generator)
        loss = self._term.join(base, self._arm.base_loss(base.prediction, base.target))
        base.prediction.grad = None  # where `join` differentiated the base loss, retain_grad kept that gradient
        loss.backward()
        self._term.settle(number + 1)
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_NORM)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        return _gradient_ratio(base, extra) if self._term.has_term else None

    def _pass(self, timesteps: Tensor | int, generator: torch.Generator) -> Pass:
        clean = self._latents[self._chosen]
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        at = torch.as_tensor(timesteps).expand(len(clean)).to(clean.device)
        prediction, target = self._model.predict(clean, at, noise, [self._captions[index] for index in self._chosen])
        prediction.retain_grad()
        return Pass(prediction, target, timesteps if isinstance(timesteps, int) else at, self._alphas)

    def _generator(self, stream: str, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(stream, self._seed, number))


def _gradient_ratio(base: Pass, extra: Pass | None) -> float:
    """The norm of the term's gradient over that of plain MSE's, each at the prediction of its own pass."""
    base_gradient = mse_gradient(base.prediction, base.target)
    with_term = (extra or base).prediction.grad
    assert with_term is not None
    term_gradient = with_term - base_gradient if extra is None else with_term
    return float(term_gradient.norm() / base_gradient.norm())


def seed_of(stream: str, seed: int, number: int) -> int:
    """The seed of a generator for step ``number`` of a run with ``seed``."""
    return int(np.random.SeedSequence([sum(stream.encode()), seed, number]).generate_state(1)[0])
