"""What the study needs of a model and its images. Images are pixels in 0..1; timesteps are on the scale 0..1000."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from freq_loss_plugin.loss.latents import PredictionType


class Captioned(NamedTuple):
    """An image, shape (3, H, W), and its caption."""

    pixels: Tensor
    caption: str


class Trainee(Protocol):
    """A model with a fresh LoRA.

    Attributes:
        parameters: of the LoRA.
        alphas_cumprod: of the noise schedule; None for flow matching.
        snr: at the timesteps 0..999, shape (1000,).
        device: of the model.
    """

    parameters: list[nn.Parameter]
    alphas_cumprod: Tensor | None
    snr: Tensor
    device: torch.device

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Timesteps as the model's trainers draw them, shape (count,), on the CPU."""

    def predict(self, latents: Tensor, timesteps: Tensor, noise: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Prediction and target, both of the latents' shape."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Scaled latents."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images."""

    def sample(self, captions: list[str], *, guidance: float, strength: float, first_seed: int = 0) -> Tensor:
        """Images, shape (n, 3, H, W); image i from the noise of the seed ``first_seed`` + i."""


class World(Protocol):
    """A model, a style that it has not seen, and images in that style.

    Attributes:
        name: of the style.
        prediction_type: of the model.
    """

    name: str
    prediction_type: PredictionType

    def training(self, seed: int, count: int) -> list[Captioned]:
        """Varied training images."""

    def uniform(self, seed: int, count: int) -> list[Captioned]:
        """Training images that are all alike."""

    def prompts(self, count: int) -> list[Captioned]:
        """Captions to sample, with the true images; never trained on."""

    def real(self, count: int) -> Tensor:
        """Other true images of the style, never trained on."""

    def new(self, seed: int, device: torch.device) -> Trainee:
        """The model with a LoRA whose initial weights follow from ``seed``."""

    def judge(self, samples: Tensor, prompts: Sequence[Captioned]) -> dict[str, float]:
        """What samples show of their captions and of the style, each 0..1."""


@contextmanager
def merged(model: nn.Module, strength: float) -> Iterator[None]:
    """Have PEFT's LoRA, whose alpha equals its rank, in the model's weights: the same up to rounding, and faster."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.scaling.update(dict.fromkeys(layer.scaling, strength))
        layer.merge()
    yield
    for layer in layers:
        layer.unmerge()
        layer.scaling.update(dict.fromkeys(layer.scaling, 1.0))
