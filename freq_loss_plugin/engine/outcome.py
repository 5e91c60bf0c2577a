"""What a run leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..guidance_token import features as clip_features
from ..training.monitor import StepMetrics
from .evaluation import Evaluation
from .model import Model


@dataclass
class Outcome:
    """A run that ended, or was interrupted.

    Attributes:
        lora: the LoRA file that was written last.
        step: optimizer steps done.
        seconds: duration without loading and encoding.
        finished: False if the run was interrupted.
        history: the numbers of every step of this run.
        evaluations: the losses on validation images, if there are any.
        errors: on validation images, by band and timestep, before and after training; see `ValidationSet.errors`.
        model: the model with its trained LoRA layers.
        features: those for the guidance token; None without one.
    """

    lora: Path
    step: int
    seconds: float
    finished: bool
    history: list[StepMetrics]
    evaluations: list[Evaluation]
    errors: tuple[Tensor, Tensor]
    model: Model = field(repr=False)
    features: clip_features.Features | None = field(repr=False, default=None)
