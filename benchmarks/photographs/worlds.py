r"""Two small diffusion models without captions: one that predicts a velocity, and one that predicts noise.

Timesteps are on the scale 0..1000. With u uniform on 0..1 and a least timestep L, they are drawn from p(t | t >= L) by

.. math:: t = 1000\,\sigma\big(-\Phi^{-1}(u\,P(t \ge L))\big), \quad P(t \ge L) = \Phi(-\operatorname{logit}(L / 1000))
          \qquad\text{(flow matching, logit-normal)}

or uniformly from the integers L..999 (epsilon).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.real_latents import FAMILIES
from freq_loss_plugin.image_quality.noise_schedules import signal_to_noise, stable_diffusion_alphas
from freq_loss_plugin.loss.latents import PredictionType

MODELS = Path(__file__).parent / "models"
_WIDTHS = (48, 80, 96)


@dataclass(frozen=True)
class World:
    """What a model is and how it is trained.

    Attributes:
        name: of the model.
        autoencoder: whose latents it has; see `benchmarks.real_latents.FAMILIES`.
    """

    name: str
    autoencoder: str

    @property
    def channels(self) -> int:
        """Of the latents."""
        return FAMILIES[self.autoencoder].channels

    @property
    def flow(self) -> bool:
        """Whether it predicts a velocity."""
        return FAMILIES[self.autoencoder].flow

    @property
    def prediction_type(self) -> PredictionType:
        """What it predicts."""
        return "flow" if self.flow else "epsilon"

    @cached_property
    def alphas(self) -> Tensor | None:
        """alpha_bar of its noise schedule, shape (1000,); None for flow matching."""
        return None if self.flow else stable_diffusion_alphas()

    @cached_property
    def snr(self) -> Tensor:
        """At the timesteps 0..999, shape (1000,)."""
        return signal_to_noise(self.prediction_type, self.alphas)

    def share(self, least: Tensor) -> Tensor:
        """P(t >= L) as trainers draw t, float64."""
        least = least.double()
        return torch.special.ndtr(-torch.logit(least / 1000)) if self.flow else (1000 - least) / 1000

    def draw(self, uniform: Tensor, least: Tensor) -> Tensor:
        """Timesteps; see the head of this module.

        Args:
            uniform: u, shape (n,), float64, 0 excluded.
            least: L, shape (n,).
        """
        if self.flow:
            return 1000 * torch.sigmoid(-torch.special.ndtri(uniform * self.share(least)))
        return (least + uniform * (1000 - least)).floor().clamp(max=999)

    def noisy(self, latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """What the model sees, of the latents' shape."""
        if self.alphas is None:
            t = (timesteps / 1000)[:, None, None, None].to(latents)
            return (1 - t) * latents + t * noise
        signal = self.alphas[timesteps.long()][:, None, None, None].to(latents)
        return signal.sqrt() * latents + (1 - signal).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor) -> Tensor:
        """What it should predict."""
        return noise - latents if self.flow else noise

    def predict(self, model: nn.Module, latents: Tensor, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A prediction and its target, both of the latents' shape.

        Args:
            model: of this world.
            latents: shape (B, C, H, W).
            timesteps: shape (B,).
            noise: of the latents' shape.
        """
        seen = self.noisy(latents, timesteps, noise).contiguous(memory_format=torch.channels_last)
        return model(seen, timesteps.float()).sample, self.target(latents, noise)

    def new_model(self) -> nn.Module:
        """A U-Net of 2.3 million parameters with random weights."""
        stages = len(_WIDTHS) - 1
        model: nn.Module = UNet2DModel(
            in_channels=self.channels,
            out_channels=self.channels,
            block_out_channels=_WIDTHS,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * stages + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * stages,
            attention_head_dim=32,
            norm_num_groups=16,
        )
        return model.to(memory_format=torch.channels_last)

    def load(self) -> nn.Module:
        """The trained base model.

        Raises:
            FileNotFoundError: it has not been trained.
        """
        file = MODELS / f"{self.name}.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"no {file}: run python -m benchmarks.photographs base --worlds {self.name}")
        model = self.new_model()
        model.load_state_dict({key: value.float() for key, value in load_file(file).items()})
        return model.eval().requires_grad_(False)


WORLDS = {"flux": World("flux", "taef1"), "sd": World("sd", "taesd")}
