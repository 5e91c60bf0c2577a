"""Stand-ins for the linear layers of packs that keep weights of four bits: what a host sees of them, and a forward.

Each is made of an ordinary linear layer, and computes what that computes.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn


class GGMLTensor(torch.Tensor):
    """As city96/ComfyUI-GGUF has it: bytes that know the shape of what they hold."""

    def __new__(cls, data, tensor_shape):
        made = torch.Tensor._make_subclass(cls, data)
        made.tensor_shape = tensor_shape
        return made

    def __init__(self, data, tensor_shape):
        pass

    def detach(self):
        return self

    @property
    def shape(self):
        return self.tensor_shape


class Packed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self._plain = [layer]  # in a list, it is no part of this module

    def forward(self, x):
        return self._plain[0](x)


class GGMLLinear(Packed):
    """As city96/ComfyUI-GGUF has it: its state tells what it takes in memory, and not its shape."""

    def __init__(self, layer):
        super().__init__(layer)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed = torch.zeros(self.out_features, self.in_features // 32 * 18, dtype=torch.uint8)
        self.weight = nn.Parameter(GGMLTensor(packed, layer.weight.shape), requires_grad=False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = torch.zeros(self.weight.size(), device="meta")


class NF4Linear(Packed):
    """As comfyanonymous/ComfyUI_bitsandbytes_NF4 has it: a column of bytes, and beside it how they were made."""

    def __init__(self, layer):
        super().__init__(layer)
        self.weight = nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.weight.quant_state = SimpleNamespace(shape=layer.weight.shape)


class UnknownLinear(Packed):
    """Packed in a way that nobody has described."""

    def __init__(self, layer):
        super().__init__(layer)
        outputs, inputs = layer.weight.shape
        self.weight = nn.Parameter(torch.zeros(outputs, inputs // 2, dtype=torch.uint8), requires_grad=False)


KINDS = {"gguf": GGMLLinear, "nf4": NF4Linear, "unknown": UnknownLinear}
