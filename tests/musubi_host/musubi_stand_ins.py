"""The real trainer classes of musubi-tuner with a denoiser of a few parameters, for one `process_batch` at a time."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import hosts
import pytest
import torch
from torch import Tensor, nn

BATCH = 3
# script, class, the function that adds its arguments, shape of its latents, sign of its target n - x0
TRAINERS = {
    "flux_2": ("flux_2_train_network", "Flux2NetworkTrainer", "flux2_setup_parser", (128, 8, 6), 1),
    "flux_kontext": (
        "flux_kontext_train_network",
        "FluxKontextNetworkTrainer",
        "flux_kontext_setup_parser",
        (16, 16, 12),
        1,
    ),
    "qwen_image": (
        "qwen_image_train_network",
        "QwenImageNetworkTrainer",
        "qwen_image_setup_parser",
        (16, 1, 16, 12),
        1,
    ),
    "zimage": ("zimage_train_network", "ZImageNetworkTrainer", "zimage_setup_parser", (16, 16, 12), -1),
    "krea2": ("krea2_train_network", "Krea2NetworkTrainer", "krea2_setup_parser", (16, 1, 16, 12), 1),
    "ideogram4": ("ideogram4_train_network", "Ideogram4NetworkTrainer", "ideogram4_setup_parser", (128, 8, 6), -1),
    "wan": ("wan_train_network", "WanNetworkTrainer", "wan_setup_parser", (16, 3, 16, 12), 1),
    "hv": ("hv_train_network", "HunyuanVideoNetworkTrainer", "hv_setup_parser", (16, 3, 16, 12), 1),
    "hv_1_5": ("hv_1_5_train_network", "HunyuanVideo15NetworkTrainer", "hv1_5_setup_parser", (32, 3, 16, 12), 1),
    "fpack": ("fpack_train_network", "FramePackNetworkTrainer", "framepack_setup_parser", (16, 3, 16, 12), 1),
    "kandinsky5": (
        "kandinsky5_train_network",
        "Kandinsky5NetworkTrainer",
        "kandinsky5_setup_parser",
        (16, 3, 16, 12),
        1,
    ),
}

# Arguments that a parser insists on.
_REQUIRED = {"kandinsky5": {"task": "k5-lite-t2v-5s-sd"}}


class Denoiser(nn.Module):
    """A 1×1 mixture of channels, plus a trainable offset."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(0.3 * torch.randn(channels, channels))
        self.offset = nn.Parameter(0.1 * torch.randn(channels))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C, ...), as given."""
        self.calls += 1
        return torch.movedim(torch.movedim(x, 1, -1) @ self.mix + self.offset, -1, 1)


@dataclass
class StandIn:
    """A trainer, ready for batches; ``passes`` are (prediction, target, sigma of each sample, noisy latents)."""

    trainer: Any
    args: Any
    denoiser: Denoiser
    batch: dict[str, Any]
    accelerator: Any
    scheduler: Any
    passes: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def process_batch(self, seed: int = 3) -> Tensor:
        """The trainer's ``process_batch``, hooked or not, from the same random state every time."""
        torch.manual_seed(seed)
        self.passes.clear()
        latents = self.batch["latents"]
        loss, _ = self.trainer.process_batch(
            self.args,
            self.accelerator,
            self.denoiser,
            None,
            dict(self.batch),
            latents,
            torch.randn_like(latents),
            self.scheduler,
            torch.float32,
            torch.float32,
            None,
            0,
        )
        return loss


def make(name: str, **settings: Any) -> StandIn:
    """A stand-in of one of `TRAINERS`, with the defaults of its own argument parser and ``settings``.

    Skips the calling test where this Python cannot import the trainer.
    """
    from accelerate import Accelerator

    script, class_name, _, shape, sign = TRAINERS[name]
    module, args = load(script), parse(name)
    vars(args).update({"seed": 11, "max_train_steps": 10, "timestep_sampling": "shift", **settings})
    trainer = getattr(module, class_name)()
    if name == "wan":
        trainer.high_low_training = False
    schedule = importlib.import_module("musubi_tuner.modules.scheduling_flow_match_discrete")
    torch.manual_seed(0)
    made = StandIn(
        trainer,
        args,
        Denoiser(shape[0]),
        {"latents": torch.randn(BATCH, *shape), "timesteps": None},
        Accelerator(cpu=True),
        schedule.FlowMatchDiscreteScheduler(shift=args.discrete_flow_shift, reverse=True, solver="euler"),
    )
    trainer.call_dit = _calling(made, name, sign)
    return made


def parse(name: str, **given: Any) -> Any:
    """The arguments of a trainer's own parser, its defaults and those that are ``given``."""
    script, _, add_arguments, *_ = TRAINERS[name]
    module = load(script)
    parser = getattr(module, add_arguments)(
        importlib.import_module("musubi_tuner.training.parser_common").setup_parser_common()
    )
    options = dict(_REQUIRED.get(name, {}))
    options |= given
    words = [
        word for key, value in options.items() for word in ([f"--{key}"] if value is True else [f"--{key}", str(value)])
    ]
    return parser.parse_args(words)


def load(script: str) -> Any:
    """A training script of musubi-tuner as a module; skips where a package is missing or too old."""
    hosts.musubi_tuner()
    try:
        # Wan's text encoder asks for a GPU when its file is read.
        with mock.patch("torch.cuda.current_device", return_value=0):
            return importlib.import_module(f"musubi_tuner.{script}")
    except ImportError as error:
        pytest.skip(f"{script} cannot be imported: {error}")


def _calling(made: StandIn, name: str, sign: int) -> Any:
    """Stands in for the trainer's ``call_dit``: the shapes and signs are those of the real one."""
    from musubi_tuner.training.trainer_base import DiTOutput

    def call_dit(
        args: Any,
        accelerator: Any,
        transformer_arg: Any,
        latents: Tensor,
        batch: Any,
        noise: Tensor,
        noisy_model_input: Tensor,
        timesteps: Tensor,
        network_dtype: Any,
        **_: Any,
    ) -> Any:
        if name in ("flux_kontext", "qwen_image"):
            latents = batch["latents"]  # where these trainers take them from
        prediction, target = transformer_arg(noisy_model_input), sign * (noise - latents)
        if name == "kandinsky5":  # frames before channels
            prediction, target = prediction.transpose(1, 2), target.transpose(1, 2)
        # Least squares: the noise level that was really mixed.
        direction = (noise - latents).flatten(1)
        sigma = ((noisy_model_input - latents).flatten(1) * direction).sum(1) / direction.square().sum(1)
        returned = 1000 * sigma + (0 if args.timestep_sampling == "sigma" else 1)
        if latents.isfinite().all():
            torch.testing.assert_close(timesteps.float(), returned.detach(), rtol=0, atol=0.5)
        made.passes.append((prediction, target, sigma.detach(), noisy_model_input.detach()))
        return DiTOutput(pred=prediction, target=target)

    return call_dit
