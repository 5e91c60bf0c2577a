"""The real trainer classes of sd-scripts with a denoiser of a few parameters, for one `process_batch` at a time."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, field
from typing import Any

import hosts
import pytest
import torch
from torch import Tensor, nn

BATCH = 3


class Denoiser(nn.Module):
    """Answers like each trainer's model: a 1×1 mixture of channels of the first argument, plus a trainable offset."""

    def __init__(self, channels: int, *, wrapped: bool = False) -> None:
        super().__init__()
        self.mix = nn.Parameter(0.3 * torch.randn(channels, channels))
        self.offset = nn.Parameter(0.1 * torch.randn(channels))
        self.wrapped = wrapped
        self.calls = 0

    def forward(self, x: Tensor | None = None, *_: Any, img: Tensor | None = None, **__: Any) -> Any:
        self.calls += 1
        x = img if x is None else x
        assert x is not None
        axis = 1 if x.ndim > 3 else 2  # FLUX packs its latents into tokens, channels last
        mixed = torch.movedim(torch.movedim(x, axis, -1) @ self.mix + self.offset, -1, axis)
        return _Sample(mixed) if self.wrapped else mixed

    def get_mod_vectors(self, **_: Any) -> None:
        """What FLUX's model says when it is not Chroma."""


@dataclass
class _Sample:
    sample: Tensor


@dataclass
class StandIn:
    """A trainer, ready for batches."""

    trainer: Any
    args: Any
    denoiser: Denoiser
    batch: dict[str, Any]
    accelerator: Any
    scheduler: Any
    strategy: Any = None
    passes: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def process_batch(self, *, is_train: bool = True, seed: int = 3) -> Tensor:
        """The trainer's ``process_batch``, hooked or not, from the same random state every time."""
        torch.manual_seed(seed)
        self.passes.clear()
        return self.trainer.process_batch(
            dict(self.batch),
            [],
            self.denoiser,
            None,
            None,
            self.scheduler,
            torch.float32,
            torch.float32,
            self.accelerator,
            self.args,
            self.strategy,
            None,
            is_train=is_train,
            train_text_encoder=False,
            train_unet=True,
        )


# script, class, channels and size of its latents
TRAINERS = {
    "sd15": ("train_network", "NetworkTrainer", (4, 16, 12)),
    "sdxl": ("sdxl_train_network", "SdxlNetworkTrainer", (4, 16, 12)),
    "sd3": ("sd3_train_network", "Sd3NetworkTrainer", (16, 16, 12)),
    "flux": ("flux_train_network", "FluxNetworkTrainer", (16, 16, 12)),
    "lumina": ("lumina_train_network", "LuminaNetworkTrainer", (16, 16, 12)),
    "hunyuan_image": ("hunyuan_image_train_network", "HunyuanImageNetworkTrainer", (64, 8, 8)),
    "anima": ("anima_train_network", "AnimaNetworkTrainer", (16, 16, 12)),
}


def make(name: str, **settings: Any) -> StandIn:
    """A stand-in of one of `TRAINERS`, with the defaults of its own argument parser and ``settings``.

    Skips the calling test where this sd-scripts has no such trainer.
    """
    from accelerate import Accelerator

    script, class_name, latent_shape = TRAINERS[name]
    if not (hosts.sd_scripts() / f"{script}.py").is_file():
        pytest.skip(f"{hosts.SD_SCRIPTS.title(hosts.sd_scripts())} has no {script}.py")
    module = importlib.import_module(script)
    args = module.setup_parser().parse_args([])
    vars(args).update({"seed": 11, "max_train_steps": 10, "model_prediction_type": "raw", **settings})
    trainer = getattr(module, class_name)()
    accelerator = Accelerator(cpu=True)
    scheduler = trainer.get_noise_scheduler(args, accelerator.device)
    channels = latent_shape[0] * (4 if name == "flux" else 1)
    torch.manual_seed(0)
    batch = {"latents": torch.randn(BATCH, *latent_shape), "loss_weights": torch.ones(BATCH)}
    batch["text_encoder_outputs_list"] = _text_conditions(name)
    if name == "sdxl":
        sizes = torch.tensor([[64, 96]] * BATCH)
        batch |= {"original_sizes_hw": sizes, "crop_top_lefts": sizes, "target_sizes_hw": sizes}
    made = StandIn(trainer, args, Denoiser(channels, wrapped=name == "sd15"), batch, accelerator, scheduler)
    made.strategy = _strategy(name)
    _record_passes(made)
    return made


def _text_conditions(name: str) -> list[Tensor]:
    text, pooled = torch.randn(BATCH, 7, 8), torch.randn(BATCH, 8)
    mask, ids = torch.ones(BATCH, 7), torch.ones(BATCH, 7, dtype=torch.long)
    return {
        "sd15": [text],
        "sdxl": [text, text, pooled],
        "sd3": [text, torch.randn(BATCH, 7, 4096), pooled, mask, mask, mask],
        "flux": [pooled, text, torch.zeros(BATCH, 7, 3), mask],
        "lumina": [text, ids, mask],
        "hunyuan_image": [text, mask, text, mask, [False] * BATCH],
        "anima": [text, mask, ids, mask, torch.zeros(BATCH)],
    }[name]


def _strategy(name: str) -> Any:
    from library import strategy_base

    if name == "sd3":
        from library import strategy_sd3

        strategy = strategy_sd3.Sd3TextEncodingStrategy()
    elif name == "anima":
        from library import strategy_anima

        strategy = strategy_anima.AnimaTextEncodingStrategy()
    else:
        return None
    strategy_base.TextEncodingStrategy._strategy = None
    strategy_base.TextEncodingStrategy.set_strategy(strategy)
    return strategy


def _record_passes(made: StandIn) -> None:
    original = made.trainer.get_noise_pred_and_target

    @functools.wraps(original)
    def get_noise_pred_and_target(*positional: Any, **named: Any) -> Any:
        results = original(*positional, **named)
        made.passes.append(tuple(tensor.detach() for tensor in results[:3]))
        return results

    made.trainer.get_noise_pred_and_target = get_noise_pred_and_target
