"""The optimizer of a run and its learning rates."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.optimization import get_scheduler

from ..lora.kohya_format import TEXT_ENCODER, UNET
from .model import Model
from .settings import Settings


def make_optimizer(model: Model, settings: Settings) -> tuple[Any, Any]:
    """AdamW over the LoRA layers, and the schedule of its learning rates."""
    rates = dict(zip((UNET, TEXT_ENCODER), settings.learning_rates, strict=True))
    groups = [{"params": model.trainable(prefix), "lr": rates[prefix]} for prefix in model.adapted]
    optimizer = torch.optim.AdamW(groups)
    schedule = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=settings.max_train_steps,
        num_cycles=settings.lr_scheduler_num_cycles,
    )
    return optimizer, schedule
