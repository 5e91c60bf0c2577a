"""The losses on validation images, for fixed noise and timesteps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..loss.params import BandSpec
from ..training.passes import Pass
from ..training.random_streams import named_generator
from ..training.term import FrequencyTerm
from ..training.validation import PREFIX
from .dataset import Example
from .tracking import Tracking

TIMESTEPS = (300, 500)
# Of `ValidationSet.errors`.
ERROR_TIMESTEPS = tuple(range(50, 1000, 100))
_BATCH = 16


@dataclass(frozen=True)
class Evaluation:
    """L_low and L_high on validation images after ``step`` steps, averaged over fixed noise and timesteps."""

    step: int
    low: float
    high: float


class ValidationSet:
    """Images that are not trained on, and the losses on them.

    Args:
        examples: the images.
        latents: their clean latents, on the CPU.
        run_pass: runs the model on clean latents of shape (B, C, H, W) at one timestep; its arguments are the latents,
            the timestep, their examples, and the generator of the noise.
        base_loss: the base loss of such a pass.
    """

    def __init__(
        self,
        examples: list[Example],
        latents: list[Tensor],
        run_pass: Callable[[Tensor, int, list[Example], torch.Generator], Pass],
        base_loss: Callable[[Pass], Tensor],
    ) -> None:
        self._examples, self._latents, self._run_pass, self._base_loss = examples, latents, run_pass, base_loss
        sizes = dict.fromkeys(example.size for example in examples)
        by_size = ([i for i, example in enumerate(examples) if example.size == size] for size in sizes)
        self._batches = [indices[i : i + _BATCH] for indices in by_size for i in range(0, len(indices), _BATCH)]

    @torch.no_grad()
    def errors(self, bands: BandSpec) -> Tensor:
        """The mean square of each band of prediction - target, of the first batch of images.

        Args:
            bands: how the bands are made.

        Returns:
            Low and high band at `ERROR_TIMESTEPS`, shape (2, 10); (2, 0) where there are no images.
        """
        found = [torch.zeros(2, 0)]
        for timestep in ERROR_TIMESTEPS if self._batches else ():
            passed = self._passed(self._batches[0], timestep, named_generator(f"errors:{timestep}"))
            split = bands.split(passed.prediction - passed.target)
            found.append(torch.tensor([[float(band.square().mean())] for band in split]))
        return torch.cat(found, dim=1)

    @torch.no_grad()
    def evaluate(self, term: FrequencyTerm, step: int, tracking: Tracking) -> Evaluation | None:
        """Compute the losses with the weights as they are now, and log them; None if there are no images.

        Args:
            term: the frequency term, which has the options.
            step: optimizer steps done.
            tracking: where to log.
        """
        if not self._examples:
            return None
        losses = []
        for timestep in TIMESTEPS:
            generator = named_generator(f"evaluation:{timestep}")
            for indices in self._batches:
                passed = self._passed(indices, timestep, generator)
                loss = term.evaluate(passed)
                losses.append((loss.low.item(), loss.high.item(), self._base_loss(passed).item()))
                if tracking.is_on and term.validation is not None:
                    clean = torch.stack([self._latents[i] for i in indices])
                    term.validate(passed, clean.to(passed.prediction.device))
        low, high, base = (sum(values) / len(values) for values in zip(*losses, strict=True))
        tracking.log({"loss/validation/step_average": base}, step)
        result = term.validation.finish() if term.validation is not None else None
        if result is not None:
            tracking.log(result.logs(), step)
            tracking.log_image(f"{PREFIX}spectrum", result.plot(), step)
        return Evaluation(step, low, high)

    def _passed(self, indices: list[int], timestep: int, generator: torch.Generator) -> Pass:
        clean = torch.stack([self._latents[i] for i in indices])
        return self._run_pass(clean, timestep, [self._examples[i] for i in indices], generator)
