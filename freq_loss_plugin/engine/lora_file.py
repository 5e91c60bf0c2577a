"""LoRA weights in kohya's format: names, metadata, and a file that is whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import FreqLossConfig
from ..guidance import file_metadata
from .dataset import DataSet
from .settings import Settings

UNET, TEXT_ENCODER = "lora_unet", "lora_te"
# The name under which sd-scripts and others know the format.
NETWORK_MODULE = "networks.lora"
_ADAPTER = "default"


def lora_layers(prefix: str, model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The LoRA layers that peft put into ``model``, by kohya's names: the module's path with underscores."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            # transformers 5 dropped the level text_model, which every LoRA file has.
            full = f"text_model.{path}" if prefix == TEXT_ENCODER and not path.startswith("text_model.") else path
            yield f"{prefix}_{full.replace('.', '_')}", module


def kohya_weights(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What a kohya LoRA file holds, by name, for ``{prefix: model with LoRA layers}``; on the CPU, float32.

    ``lora_down`` (r, in, …) and ``lora_up`` (out, r, …) change a layer by up·down·alpha/r.
    """
    weights = {}
    for prefix, model in models.items():
        for name, layer in lora_layers(prefix, model):
            rank, scaling = layer.r[_ADAPTER], layer.scaling[_ADAPTER]
            weights[f"{name}.lora_down.weight"] = layer.lora_A[_ADAPTER].weight
            weights[f"{name}.lora_up.weight"] = layer.lora_B[_ADAPTER].weight
            weights[f"{name}.alpha"] = torch.tensor(float(rank * scaling))
    return {name: weight.detach().float().cpu().contiguous().clone() for name, weight in weights.items()}


@torch.no_grad()
def load_kohya_weights(models: dict[str, nn.Module], weights: dict[str, Tensor]) -> None:
    """Put the weights of `kohya_weights` back into the LoRA layers.

    Raises:
        KeyError: a layer has no weights there.
    """
    for prefix, model in models.items():
        for name, layer in lora_layers(prefix, model):
            layer.lora_A[_ADAPTER].weight.copy_(weights[f"{name}.lora_down.weight"])
            layer.lora_B[_ADAPTER].weight.copy_(weights[f"{name}.lora_up.weight"])


def metadata(settings: Settings, loss: FreqLossConfig, data: DataSet, step: int, started: float) -> dict[str, str]:
    """The ``ss_*`` entries that sd-scripts writes and others show, and the loss's own, those of the kohya hook."""
    unet_rate, text_rate = settings.learning_rates
    version = "sd_v2" if settings.v2 else "sd_v1"
    entries: dict[str, Any] = {
        "ss_network_module": NETWORK_MODULE,
        "ss_network_dim": settings.network_dim,
        "ss_network_alpha": settings.network_alpha,
        "ss_base_model_version": f"{version}_v" if settings.v2 and settings.v_parameterization else version,
        "ss_v2": settings.v2,
        "ss_sd_model_name": Path(settings.pretrained_model_name_or_path).name,
        "ss_output_name": settings.output_name,
        "ss_learning_rate": settings.learning_rate,
        "ss_unet_lr": unet_rate,
        "ss_text_encoder_lr": text_rate or None,
        "ss_optimizer": settings.optimizer_type,
        "ss_lr_scheduler": settings.lr_scheduler,
        "ss_lr_warmup_steps": settings.lr_warmup_steps,
        "ss_max_train_steps": settings.max_train_steps,
        "ss_steps": step,
        "ss_total_batch_size": settings.train_batch_size,
        "ss_gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "ss_gradient_checkpointing": settings.gradient_checkpointing,
        "ss_mixed_precision": settings.mixed_precision,
        "ss_seed": settings.seed,
        "ss_resolution": str(settings.size),
        "ss_enable_bucket": settings.enable_bucket,
        "ss_clip_skip": settings.clip_skip,
        "ss_min_snr_gamma": settings.min_snr_gamma,
        "ss_zero_terminal_snr": settings.zero_terminal_snr,
        "ss_num_train_images": sum(example.repeats for example in data.examples),
        "ss_training_started_at": started,
        "ss_tag_frequency": json.dumps(data.tag_frequency),
    }
    texts = {key: str(value) for key, value in entries.items()}
    if loss.enabled or data.features is not None:
        texts |= loss.file_metadata(NETWORK_MODULE)
    return texts if data.features is None else texts | file_metadata(loss.guidance_token, data.features)


def save(file: Path, weights: dict[str, Tensor], texts: dict[str, str], precision: str | None) -> None:
    """Write a safetensors file, whole or not at all; see `write_whole`."""
    dtype = {None: torch.float32, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    converted = {name: weight.to(dtype) for name, weight in weights.items()}
    write_whole(file, lambda part: save_file(converted, part, texts))


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file beside ``file`` and move it there: a full disk or a killed process harms no old file.

    Raises:
        OSError: it cannot be written; says which and why.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    try:
        try:
            write(part)
        except Exception as error:  # safetensors, torch and matplotlib have errors of their own for a full disk
            raise OSError(f"{file} cannot be written: {error}") from error
        with open(part, "rb+") as written:
            os.fsync(written.fileno())
        part.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
