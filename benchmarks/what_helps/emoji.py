"""The flow-matching toy model and emoji by hands that it has not seen, as a world of the study."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from assets.make_tiny_flow import emoji
from assets.make_tiny_flow.features import features_of
from assets.make_tiny_flow.model import load
from freq_loss_plugin.image_quality.noise_schedules import signal_to_noise
from freq_loss_plugin.loss.latents import PredictionType
from freq_loss_plugin.training.random_streams import separate_random_stream

from .world import Captioned, merged

RANK = 16
# Every linear layer of both streams, as networks.lora_sd3 of sd-scripts adapts them.
_TARGETS = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2))"
)
# Concepts by place: those of the prompts, of the real images, and from there on of the training images.
_PROMPTS, _REAL = 32, 256


class EmojiWorld:
    """See `world.World`.

    Args:
        style: one of `emoji.STYLES` but the first.
    """

    prediction_type: PredictionType = "flow"

    def __init__(self, style: str) -> None:
        self.name = style

    def training(self, seed: int, count: int) -> list[Captioned]:
        """Some of the concepts."""
        rest = _concepts()[_PROMPTS + _REAL :]
        return self._images(np.random.default_rng((51, seed)).choice(len(rest), count, replace=False), rest)

    def uniform(self, seed: int, count: int) -> list[Captioned]:
        """Faces."""
        faces = [each for each in _concepts()[_PROMPTS + _REAL :] if each.category.startswith("face-")]
        return self._images(np.random.default_rng((52, seed)).choice(len(faces), count, replace=False), faces)

    def prompts(self, count: int) -> list[Captioned]:
        """The first concepts."""
        assert count <= _PROMPTS
        return self._images(range(count), _concepts())

    def real(self, count: int) -> Tensor:
        """The next concepts, shape (n, 3, 64, 64)."""
        assert count <= _REAL
        return torch.stack([each.pixels for each in self._images(range(count), _concepts()[_PROMPTS:])])

    def new(self, seed: int, device: torch.device) -> EmojiTrainee:
        """The model with a new LoRA on its transformer."""
        return EmojiTrainee(seed, device)

    def judge(self, samples: Tensor, prompts: Sequence[Captioned]) -> dict[str, float]:
        """Structure, background and style, each 0..1.

        Structure: the fraction of samples whose features are nearest to the true image of their own caption, of all
        prompts. Style: the fraction whose features are nearer to that image than to the same concept as the base model
        draws it. Background: 1 minus the mean difference of the fraction of white pixels along
        the border from that of the true image.
        """
        true_images = torch.stack([each.pixels for each in prompts])
        ours, true = features_of(samples), features_of(true_images)
        base = features_of(torch.stack([each.pixels for each in EmojiWorld("google").prompts(len(prompts))]))
        nearest = torch.cdist(ours, true).argmin(dim=1)
        is_nearer = (ours - true).norm(dim=1) < (ours - base).norm(dim=1)
        return {
            "structure": float((nearest == torch.arange(len(ours))).float().mean()),
            "background": 1 - float((_white_border(samples) - _white_border(true_images)).abs().mean()),
            "style": float(is_nearer.float().mean()),
        }

    def _images(self, places: Sequence[int] | np.ndarray, concepts: list[emoji.Concept]) -> list[Captioned]:
        return [_captioned(concepts[place], self.name) for place in places]


class EmojiTrainee:
    """See `world.Trainee`."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._model = load().requires_grad_(False)
        with separate_random_stream(f"lora:{seed}", torch.device("cpu")):
            config = LoraConfig(r=RANK, lora_alpha=float(RANK), target_modules=_TARGETS)
            inject_adapter_in_model(config, self._model.transformer)
        self._model.to(device)
        self.parameters: list[nn.Parameter] = [each for each in self._model.parameters() if each.requires_grad]
        self.alphas_cumprod: Tensor | None = None
        self.snr = signal_to_noise("flow")
        self.device = device
        self._text: dict[str, tuple[Tensor, Tensor]] = {}

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Sigmoids of normal numbers, the timestep_sampling of sd-scripts' recipes for FLUX and SD3."""
        return 1000 * torch.randn(count, generator=generator).sigmoid()

    def predict(self, latents: Tensor, timesteps: Tensor, noise: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Prediction and target."""
        t = timesteps.float() / 1000
        at = t[:, None, None, None]
        text = [self._encoded(caption) for caption in captions]
        states = torch.stack([each[0] for each in text]), torch.stack([each[1] for each in text])
        return self._model.velocity((1 - at) * latents + at * noise, t, states), noise - latents

    def encode(self, pixels: Tensor) -> Tensor:
        """Scaled means of the posterior."""
        return self._model.encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, on the CPU."""
        return self._model.decode(latents)

    @torch.no_grad()
    def sample(
        self, captions: list[str], *, guidance: float, strength: float, first_seed: int = 0, steps: int = 15
    ) -> Tensor:
        """By Euler's method."""
        seeds = [torch.Generator().manual_seed(first_seed + number) for number in range(len(captions))]
        noise = torch.stack([torch.randn(4, 16, 16, generator=generator) for generator in seeds]).to(self.device)
        with merged(self._model.transformer, strength):
            parts = [
                self._model.sample(captions[i : i + 32], noise[i : i + 32], steps=steps, guidance=guidance)
                for i in range(0, len(captions), 32)
            ]
        return self.decode(torch.cat(parts))

    def _encoded(self, caption: str) -> tuple[Tensor, Tensor]:
        if caption not in self._text:
            with torch.no_grad():
                states, pooled = self._model.text([caption])
            self._text[caption] = states[0], pooled[0]
        return self._text[caption]


def _white_border(images: Tensor) -> Tensor:
    """Fractions, shape (n,)."""
    white = (images > 0.9).all(dim=1)
    return torch.cat([white[:, 0], white[:, -1], white[:, :, 0], white[:, :, -1]], dim=1).float().mean(dim=1)


@lru_cache(maxsize=1)
def _concepts() -> list[emoji.Concept]:
    return emoji.concepts(emoji.fetch())


@cache
def _captioned(concept: emoji.Concept, style: str) -> Captioned:
    pixels = torch.from_numpy(emoji.image(emoji.fetch(), concept, style)).permute(2, 0, 1).contiguous()
    return Captioned(pixels, concept.caption(style))
