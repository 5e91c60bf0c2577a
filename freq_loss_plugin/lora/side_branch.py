r"""A LoRA beside a model's layers instead of in its weights, so that its strength can change with every call.

A layer y = W x + b with a LoRA of strength s is y = (W + s·dW) x + b, and, since that is linear,

.. math:: y = (W x + b) + s \cdot dW x, \qquad dW = \frac{\alpha}{r} B A

A forward hook adds the second term to the layer's output. No weight is changed, copied or rounded, whatever format the
model stores its weights in; both forms agree up to rounding. Source: Hu et al. 2021 (arXiv 2106.09685), figure 1.
"""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTIONS: dict[int, Any] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Branch(ABC):
    """What is added to a layer's output at strength 1. Its weights stay on the devices of its inputs until `release`.

    One branch may serve copies of a layer on several devices, each used by its own thread.
    """

    def __init__(self) -> None:
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The addition for the layer's input ``x``."""

    def release(self) -> None:
        """Free the copies on devices."""
        self._on_device.clear()


class LowRank(Branch):
    """``scale·up(down(x))``.

    Args:
        up: B, shape (out, r) or (out, r, 1, …).
        down: A, shape (r, in), or (r, in, …) with the kernel of a convolution.
        scale: alpha/r.
        padding: (before, after), the number of the layer's outputs around these, where it combines several layers (as
            a joint projection of queries, keys and values does).
    """

    def __init__(self, up: Tensor, down: Tensor, scale: float, padding: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        self._weights = (down, up)
        self._scale, self._padding = scale, padding

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """See `Branch`."""
        down, up = self._on_device.get(x.device, self._weights)
        if down.device != x.device or down.dtype != x.dtype:
            down, up = self._on_device[x.device] = (down.to(x), up.to(x))
        hidden = apply_weight(layer, x, down)
        if is_convolution(layer):
            y = torch.einsum("or,br...->bo...", up.flatten(1), hidden)
            padding = (*(0, 0) * (x.ndim - 2), *self._padding)
        else:
            y, padding = F.linear(hidden, up.flatten(1)), self._padding
        return F.pad(y * self._scale, padding) if any(padding) else y * self._scale


class Dense(Branch):
    """``dW x`` with dW recomputed in every call, since keeping it would take as much memory as the layer.

    Args:
        weight_change: returns dW, of the shape of the layer's weight, on the given device.
    """

    def __init__(self, weight_change: Callable[[torch.device], Tensor]) -> None:
        super().__init__()
        self._weight_change = weight_change

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """See `Branch`."""
        return apply_weight(layer, x, self._weight_change(x.device).to(x))


class Bias(Branch):
    """A change of the bias, shape (out,)."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self._values = values

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """See `Branch`."""
        values = self._values.to(x)
        return values.reshape(-1, *([1] * (x.ndim - 2))) if is_convolution(layer) else values


@contextlib.contextmanager
def attached(branches: Mapping[nn.Module, Sequence[Branch]], strength: float) -> Iterator[set[nn.Module]]:
    """Add ``strength`` times the branches to the outputs of their layers inside the ``with`` block.

    Inside, models compiled by torch.compile run uncompiled (PyTorch 2.6 or newer), since compiled code ignores hooks.
    Strength 0 attaches nothing. Blocks may be nested; the hooks are removed at the end, also after an exception.

    Args:
        branches: layer to branches.
        strength: s.

    Yields:
        The set of those layers that have run so far.
    """
    executed: set[nn.Module] = set()
    with contextlib.ExitStack() as stack:
        if strength != 0 and branches:
            stack.enter_context(_uncompiled())
            for layer, layer_branches in branches.items():
                stack.callback(layer.register_forward_hook(_hook(layer_branches, strength, executed)).remove)
        yield executed


def can_run_uncompiled() -> bool:
    """Whether this PyTorch can run compiled models uncompiled (2.6 or newer)."""
    return hasattr(torch.compiler, "set_stance")


def is_convolution(layer: nn.Module) -> bool:
    """Whether a layer is a convolution, by its attributes: hosts have layer classes of their own."""
    return hasattr(layer, "stride") and hasattr(layer, "dilation")


def can_attach(layer: nn.Module) -> bool:
    """Whether a layer supports branches: linear layers and convolutions without groups do."""
    if is_convolution(layer):
        return getattr(layer, "groups", 1) == 1
    is_linear = hasattr(layer, "in_features") or hasattr(getattr(layer, "weight", None), "quant_state")
    return is_linear and len(weight_shape(layer) or (0, 0)) == 2


def weight_shape(layer: nn.Module) -> tuple[int, ...] | None:
    """The shape of the weight that a layer computes with; None where that is unknown.

    Quantized weights are packed, several in a byte, so that their tensors have another shape. GGUF stores the true one
    as ``tensor_shape``, bitsandbytes as ``quant_state.shape``, and linear layers of any kind have it in ``in_features``
    and ``out_features``.
    """
    weight = getattr(layer, "weight", None)
    for shape in (getattr(weight, "tensor_shape", None), getattr(getattr(weight, "quant_state", None), "shape", None)):
        if shape is not None:
            return tuple(shape)
    if hasattr(layer, "in_features") and hasattr(layer, "out_features") and getattr(weight, "ndim", 2) <= 2:
        linear: Any = layer
        return (linear.out_features, linear.in_features)
    return tuple(weight.shape) if isinstance(weight, Tensor) and weight.is_floating_point() else None


def apply_weight(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's linear map with another weight and no bias, shape (out', in) or (out', in, …)."""
    if not is_convolution(layer):
        return F.linear(x, weight.flatten(1))
    kernel = weight if weight.ndim > 2 else weight.reshape(*weight.shape, *([1] * (x.ndim - 2)))
    convolution = _CONVOLUTIONS[x.ndim]
    return convolution(x, kernel, None, layer.stride, layer.padding, layer.dilation)


def _uncompiled() -> contextlib.AbstractContextManager[None]:
    # Where this module has not been imported, nothing has been compiled; importing it takes seconds.
    if "torch._dynamo" not in sys.modules or not can_run_uncompiled():
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _hook(
    branches: Sequence[Branch], strength: float, executed: set[nn.Module]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add_branches(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        executed.add(layer)
        for branch in branches:
            output = output + strength * branch(layer, args[0])
        return output

    return add_branches
