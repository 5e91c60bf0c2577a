"""A LoRA file as branches beside the layers of a model."""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch
from torch import Tensor

from ..freq_loss_plugin.lora.metadata import LoraFile, LoraFileError
from ..freq_loss_plugin.lora.side_branch import Bias, Branch, Dense, LowRank, can_attach, weight_shape
from .lora_match import read_patches


def lora_branches(lora: LoraFile, weights: dict[str, Tensor], model: Any) -> dict[str, list[Branch]]:
    """The branches of a LoRA, by the paths of their layers.

    Args:
        lora: the file's header.
        weights: its tensors.
        model: ComfyUI's model patcher.

    Raises:
        LoraFileError: a module is not something that is added to a layer's output.
    """
    targets = comfy.lora.model_lora_keys_unet(model.model, {})
    tensors = comfy.lora_convert.convert_lora(weights)
    patches = read_patches(tensors, targets, [model.model])
    # By the file's names: the positions of these tensors in core's adapters differ between its versions.
    no_additions = {
        target
        for name, target in targets.items()
        if f"{name}.dora_scale" in tensors or f"{name}.reshape_weight" in tensors
    }
    branches: dict[str, list[Branch]] = {}
    for target, patch in patches.items():
        # A target is the key of a weight, or that key with the rows that are adapted, and a function of the change.
        key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None, None)[:3]
        path, _, parameter = key.rpartition(".")
        layer = comfy.utils.get_attr(model.model, path)
        if parameter == "weight" and weight_shape(layer) is None:
            raise LoraFileError(
                f"{lora.name} cannot be gated: the weight of the layer {path} is packed in an unknown format, so the "
                "LoRA cannot run beside it. Use a LoRA loader"
            )
        is_addition = target not in no_additions and can_attach(layer)
        branch = _make_branch(patch, key, offset, function, layer) if is_addition else None
        if branch is None:
            raise LoraFileError(
                f"{lora.name} cannot be gated: it adapts {path} by something other than an addition to the layer's "
                f"output ({_patch_type(patch)}); the gate supports LoRA, LoHa and LoKr without DoRA. Use a LoRA loader"
            )
        branches.setdefault(path, []).append(branch)
    return branches


def _make_branch(patch: Any, key: str, offset: Any, function: Any, layer: Any) -> Branch | None:
    """The branch of one patch that core has read from a LoRA file.

    Args:
        patch: core's weight adapter, or a tuple of type and values.
        key: of the parameter, "path.weight" or "path.bias".
        offset: (dimension, start, length) where the patch adapts a part of the weight, else None.
        function: core's function of the changed weight, or None.
        layer: that of the parameter.

    Returns:
        None where the patch is not an addition to the layer's output.
    """
    patch_type = _patch_type(patch)
    if key.endswith(".bias"):
        return Bias(patch[1][0]) if patch_type == "diff" and offset is None and function is None else None
    shape = weight_shape(layer)
    if shape is None or patch_type not in ("lora", "loha", "lokr", "diff"):
        return None
    if patch_type == "lora" and function is None and (offset is None or offset[0] == 0):
        up, down, alpha, mid = patch.weights[:4]
        if mid is None:
            scale = 1.0 if alpha is None else alpha / down.shape[0]
            padding = (0, 0) if offset is None else (offset[1], shape[0] - offset[1] - offset[2])
            return LowRank(up, down, scale, padding)

    def weight_change(device: torch.device) -> Tensor:
        # Core adds the change to a weight; added to zeros, it is the change itself.
        zeros = torch.zeros(shape, device=device)
        return comfy.lora.calculate_weight([(1.0, patch, 1.0, offset, function)], zeros, key)

    return Dense(weight_change)


def _patch_type(patch: Any) -> str:
    return getattr(patch, "name", None) or str(patch[0])
