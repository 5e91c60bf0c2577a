"""LoRA weights in kohya's format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from ..atomic_files import write_whole

UNET, TEXT_ENCODER = "lora_unet", "lora_te"
# The network module of sd-scripts that writes this format.
NETWORK_MODULE = "networks.lora"
_ADAPTER = "default"


def lora_layers(prefix: str, model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The LoRA layers that peft added to ``model``.

    Args:
        prefix: `UNET` or `TEXT_ENCODER`.
        model: the model.

    Yields:
        Name and layer; kohya's name is prefix and module path, with underscores.
    """
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            # transformers 5 dropped the level text_model, which the names in every LoRA file have.
            if prefix == TEXT_ENCODER and not path.startswith("text_model."):
                path = f"text_model.{path}"
            yield f"{prefix}_{path.replace('.', '_')}", module


def kohya_weights(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of a kohya LoRA file: dW = lora_up·lora_down·alpha/r for each layer.

    Args:
        models: models with LoRA layers, by prefix.

    Returns:
        By name, on the CPU, float32: ``lora_down`` (r, in, ...), ``lora_up`` (out, r, ...) and the scalar ``alpha``.
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
    """Load the weights of `kohya_weights` into the LoRA layers.

    Raises:
        KeyError: the weights of a layer are missing.
    """
    for prefix, model in models.items():
        for name, layer in lora_layers(prefix, model):
            layer.lora_A[_ADAPTER].weight.copy_(weights[f"{name}.lora_down.weight"])
            layer.lora_B[_ADAPTER].weight.copy_(weights[f"{name}.lora_up.weight"])


def save(file: Path, weights: dict[str, Tensor], metadata: dict[str, str], precision: str | None) -> None:
    """Write a safetensors file atomically.

    Args:
        file: the file.
        weights: tensors by name.
        metadata: its metadata.
        precision: ``"float"``, ``"fp16"`` or ``"bf16"``; None for float.

    Raises:
        OSError: it cannot be written.
    """
    dtype = {None: torch.float32, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    converted = {name: weight.to(dtype) for name, weight in weights.items()}
    write_whole(file, lambda part: save_file(converted, part, metadata))
