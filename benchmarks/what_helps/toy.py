"""The toy model (epsilon-prediction) and the two styles that it has not seen, as a world of the study."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from freq_loss_plugin.engine.comparison import Sampling, sample
from freq_loss_plugin.engine.model import Model, load
from freq_loss_plugin.engine.settings import Settings
from freq_loss_plugin.image_quality.noise_schedules import signal_to_noise
from freq_loss_plugin.loss.latents import PredictionType
from freq_loss_plugin.toy_model import model_folder
from freq_loss_plugin.toy_model.attributes import frame_fraction, measure, weave_agreement
from freq_loss_plugin.toy_model.scenes import STYLES, Scene, draw, random_scene

from .world import Captioned, merged

RANK = 16
_STRUCTURE = ("position", "color", "shape")
# Streams of scenes.
_TRAINING, _PROMPTS, _REAL = 41, 42, 43


class ToyWorld:
    """See `world.World`.

    Args:
        style: ``frames`` or ``weave``.
    """

    prediction_type: PredictionType = "epsilon"

    def __init__(self, style: str) -> None:
        self.name = style

    def training(self, seed: int, count: int) -> list[Captioned]:
        """Random scenes."""
        return _drawn(self.name, (_TRAINING, self._number, seed), count)[1]

    def uniform(self, seed: int, count: int) -> list[Captioned]:
        """Red circles in the center on white."""
        scenes, _ = _drawn(self.name, (_TRAINING, self._number, seed, 1), count)
        alike = {"shape": "circle", "color": "red", "position": "in the centre", "background": "white"}
        return [_captioned(Scene(**{**vars(scene), **alike}), self.name) for scene in scenes]

    def prompts(self, count: int) -> list[Captioned]:
        """Random scenes; the same for every seed."""
        return _drawn(self.name, (_PROMPTS, self._number), count)[1]

    def real(self, count: int) -> Tensor:
        """Images of other random scenes, shape (n, 3, 128, 128)."""
        return torch.stack([each.pixels for each in _drawn(self.name, (_REAL, self._number), count)[1]])

    def new(self, seed: int, device: torch.device) -> ToyTrainee:
        """The model with a new LoRA on its UNet."""
        return ToyTrainee(seed, device)

    def judge(self, samples: Tensor, prompts: Sequence[Captioned]) -> dict[str, float]:
        """Structure, texture, background and style, each 0..1: measured in the pixels.

        Structure is the fraction of right positions, colors and shapes; style the fraction of the border that is framed
        (``frames``), or of squares that are woven right (``weave``, which has no texture of its own).
        """
        images = [each.permute(1, 2, 0).numpy() for each in samples]
        scenes = _drawn(self.name, (_PROMPTS, self._number), len(prompts))[0]
        measured = [measure(image, self.name) for image in images]

        def right(name: str) -> float:
            pairs = zip(measured, scenes, strict=True)
            return float(np.mean([words[name] == getattr(scene, name) for words, scene in pairs]))

        styled = frame_fraction if self.name == "frames" else weave_agreement
        style = float(np.mean([styled(image) for image in images]))
        return {
            "structure": float(np.mean([right(name) for name in _STRUCTURE])),
            "texture": right("texture") if self.name == "frames" else style,
            "background": right("background"),
            "style": style,
        }

    @property
    def _number(self) -> int:
        return STYLES.index(self.name)


class ToyTrainee:
    """See `world.Trainee`."""

    def __init__(self, seed: int, device: torch.device) -> None:
        settings = Settings(
            pretrained_model_name_or_path=str(model_folder()),
            train_data_dir=str(model_folder()),  # not read here
            resolution="128",
            network_dim=RANK,
            network_alpha=float(RANK),
            network_train_unet_only=True,
            seed=seed,
        )
        self._model: Model = load(settings, device)
        self.parameters: list[nn.Parameter] = self._model.trainable("lora_unet")
        self.alphas_cumprod: Tensor | None = self._model.scheduler.alphas_cumprod.float().to(device)
        self.snr = signal_to_noise("epsilon", self.alphas_cumprod)
        self.device = device

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Uniform timesteps, as DDPM trainers draw them."""
        return torch.randint(1000, (count,), generator=generator)

    def predict(self, latents: Tensor, timesteps: Tensor, noise: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Prediction and target."""
        return self._model.predict(latents, timesteps.long(), noise, captions)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Scaled means of the posterior."""
        vae = self._model.pipeline.vae
        means = [vae.encode(part.to(self.device) * 2 - 1).latent_dist.mean for part in pixels.split(8)]
        return torch.cat(means) * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, on the CPU."""
        vae = self._model.pipeline.vae
        parts = [vae.decode(part / vae.config.scaling_factor).sample for part in latents.split(8)]
        return (torch.cat(parts).cpu() / 2 + 0.5).clamp(0, 1)

    def sample(self, captions: list[str], *, guidance: float, strength: float, first_seed: int = 0) -> Tensor:
        """By DDIM in ten steps."""
        scheduler = self._model.scheduler
        with merged(self._model.pipeline.unet, strength):
            samples = sample(self._model, Sampling(captions, steps=10, guidance=guidance, seed=first_seed), (128, 128))
        self._model.pipeline.scheduler = scheduler
        return samples


def _drawn(style: str, stream: tuple[int, ...], count: int) -> tuple[list[Scene], list[Captioned]]:
    generator = np.random.default_rng(stream)
    scenes = [random_scene(generator) for _ in range(count)]
    return scenes, [_captioned(scene, style) for scene in scenes]


def _captioned(scene: Scene, style: str) -> Captioned:
    pixels = torch.from_numpy((draw(scene, style) * 255).round() / 255).permute(2, 0, 1).contiguous()
    return Captioned(pixels, scene.caption(style))
