"""Trains a LoRA in one arm. Two arms with the same seed see the same batches, noise and timesteps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor

from freq_loss_plugin.engine.dataset import Batches, Example
from freq_loss_plugin.image_quality.pixels import as_pixels
from freq_loss_plugin.image_quality.survey import survey
from freq_loss_plugin.image_quality.trained_image import TrainedImage
from freq_loss_plugin.loss.sample_weights import min_snr_weights
from freq_loss_plugin.training.passes import Pass
from freq_loss_plugin.training.random_streams import named_generator
from freq_loss_plugin.training.term import FrequencyTerm
from freq_loss_plugin.training.timesteps import Draws

from .arms import Arm, Weighting
from .images import read
from .world import Trainee, World

BATCH, MAX_NORM = 4, 1.0


class ArmTraining:
    """A run of ``steps`` optimizer steps, times the arm's length.

    Args:
        world: what the trainee draws.
        trainee: its LoRA is trained.
        arm: see `arms`.
        captions: the image files, and their captions.
        seed: of the batches, noise and timesteps.
        steps: see above.
        rate: the peak learning rate.

    Attributes:
        least: the least timestep of each image, shape (n,).
    """

    def __init__(
        self,
        world: World,
        trainee: Trainee,
        arm: Arm,
        captions: Mapping[Path, str],
        *,
        seed: int,
        steps: int,
        rate: float,
    ) -> None:
        self._trainee, self._arm, self._seed, self.length = trainee, arm, seed, steps * arm.length
        files = list(captions)
        pixels = read(files)
        side = pixels.shape[-1]
        examples = [Example(file, caption, 1, (side, side)) for file, caption in captions.items()]
        self._batches = Batches(examples, BATCH, seed)
        self._captions = list(captions.values())
        self._latents = trainee.encode(pixels)
        self.least = torch.zeros(len(files))
        if arm.config.gated:
            self._restore(files, side)
        counts = Counter(map(int, self.least.tolist()))
        self._term = FrequencyTerm(arm.config, world.prediction_type, seed=seed, least=counts)
        self._optimizer = torch.optim.AdamW(trainee.parameters, lr=rate)
        self._schedule = get_scheduler("cosine", self._optimizer, num_warmup_steps=0, num_training_steps=self.length)

    def run(self) -> None:
        """Train to the end. A LoRA that is not finite then is set to zero, which leaves the base model: see plan.md."""
        for number in range(self.length):
            self.add_gradient(number)
            self._term.settle(number + 1)
            torch.nn.utils.clip_grad_norm_(self._trainee.parameters, MAX_NORM)
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()
        if not all(parameter.isfinite().all() for parameter in self._trainee.parameters):
            for parameter in self._trainee.parameters:
                parameter.data.zero_()

    def add_gradient(self, number: int) -> None:
        """Run the passes of batch ``number``."""
        chosen = self._batches[number]
        least = self.least[chosen] if self.least[chosen].any() else None
        plan = self._term.plan(least)
        if plan.extra is not None:
            at = torch.full((len(chosen),), plan.extra)
            extra = self._pass(chosen, at, named_generator(plan.stream))._replace(timesteps=plan.extra)
            self._term.extra_pass(extra, Tensor.backward)
        generator = named_generator(f"base:{self._seed}:{number}")
        timesteps = self._draw(len(chosen), generator)
        if plan.chooses:
            timesteps = self._term.choose(Draws(timesteps, self._draw))
        passed = self._pass(chosen, timesteps, generator)
        balanced = self._term.balance(passed)
        losses = losses_of(self._arm.weighting, passed._replace(prediction=balanced.prediction))
        losses = losses if balanced.weights is None else losses * balanced.weights
        self._term.join(passed, losses.mean()).backward()

    def _draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        timesteps = self._trainee.draw(count, generator)
        least = self._arm.min_timestep
        return (least + timesteps * (1000 - least) / 1000).to(timesteps.dtype)

    def _pass(self, chosen: list[int], timesteps: Tensor, generator: torch.Generator) -> Pass:
        clean, device = self._latents[chosen], self._trainee.device
        noise = torch.randn(clean.shape, generator=generator).to(device)
        at = timesteps.to(device)
        prediction, target = self._trainee.predict(clean, at, noise, [self._captions[index] for index in chosen])
        return Pass(prediction, target, at, self._trainee.alphas_cumprod)

    def _restore(self, files: list[Path], side: int) -> None:
        """Restore the latents of images with defects, and find their least timesteps, as training programs do."""

        def encode(image: Image.Image) -> Tensor:
            return self._trainee.encode(as_pixels(image)[None])[0]

        images = [TrainedImage(file, (side, side)) for file in files]
        found = survey(images, self._arm.config, encode, self._trainee.snr, end=1000)
        self.least = torch.tensor([float(found.least.get(image, 0)) for image in images])
        filters = map(found.restorations.get, images)
        restored = [
            latents if one is None else one.apply(latents) for latents, one in zip(self._latents, filters, strict=True)
        ]
        self._latents = torch.stack(restored)


def losses_of(weighting: Weighting, passed: Pass) -> Tensor:
    """The loss of each sample, shape (B,)."""
    residual = passed.prediction - passed.target
    if weighting == "Haar":
        return _haar_mse(residual)
    losses = residual.square().mean(dim=(1, 2, 3))
    if weighting == "none":
        return losses
    assert passed.alphas_cumprod is not None
    if weighting == "min-SNR 5":
        return losses * min_snr_weights("epsilon", passed.timesteps, passed.alphas_cumprod, 5.0)
    signal = passed.alphas_cumprod[torch.as_tensor(passed.timesteps).long()]
    return losses / (signal / (1 - signal)).clamp(max=1000).sqrt()


def _haar_mse(low: Tensor) -> Tensor:
    """Mean squared coefficients in an orthonormal Haar basis of two levels: plain MSE, by Parseval's theorem."""
    size, total = low[0].numel(), torch.zeros(len(low), device=low.device)
    for _ in range(2):
        rows = low[..., ::2, :] + low[..., 1::2, :], low[..., ::2, :] - low[..., 1::2, :]
        low, *details = [(half[..., ::2] + sign * half[..., 1::2]) / 2 for half in rows for sign in (1, -1)]
        total = total + sum(detail.square().sum(dim=(1, 2, 3)) for detail in details)
    return (total + low.square().sum(dim=(1, 2, 3))) / size
