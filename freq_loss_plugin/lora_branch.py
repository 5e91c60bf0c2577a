r"""A LoRA beside a model instead of inside its weights, so that it can be there in one call and gone in the next.

A layer y = W x + b with a LoRA of strength s is y = (W + s·dW) x + b, and, since that is linear,

.. math:: y = (W x + b) + s \cdot dW x, \qquad dW = \frac{\alpha}{r} B A

The second term is computed by a hook beside the layer. No weight is changed, copied or rounded, whatever format the
model keeps its weights in; the two differ by rounding. Source: Hu et al. 2021 (arXiv 2106.09685), figure 1.
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
    """What is added to a layer's output for strength 1. Its weights stay where they were last used, until `release`.

    One branch may stand beside copies of a layer on several devices, each used by a thread of its own.
    """

    def __init__(self) -> None:
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The addition for the layer's input ``x``."""

    def release(self) -> None:
        """Let go of what was moved to a device."""
        self._moved.clear()


class LowRank(Branch):
    """``scale·up(down(x))``.

    Args:
        up: B, shape (out, r) or (out, r, 1, …).
        down: A, shape (r, in), or (r, in, …) with the kernel of a convolution.
        scale: alpha/r.
        rows: (before, after), how many outputs the layer has around these, where it holds several layers in one.
    """

    def __init__(self, up: Tensor, down: Tensor, scale: float, rows: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        self._weights = (down, up)
        self._scale, self._rows = scale, rows

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """See `Branch`."""
        down, up = self._moved.get(x.device, self._weights)
        if down.device != x.device or down.dtype != x.dtype:
            down, up = self._moved[x.device] = (down.to(x), up.to(x))
        hidden = apply(layer, x, down)
        if is_convolution(layer):
            y = torch.einsum("or,br...->bo...", up.flatten(1), hidden)
            around = (*(0, 0) * (x.ndim - 2), *self._rows)
        else:
            y, around = F.linear(hidden, up.flatten(1)), self._rows
        return F.pad(y * self._scale, around) if any(around) else y * self._scale


class Dense(Branch):
    """``dW x`` with a weight that is made anew for every call: it would take as much memory as the layer.

    Args:
        make: the device to dW, of the shape of the layer's weight.
    """

    def __init__(self, make: Callable[[torch.device], Tensor]) -> None:
        super().__init__()
        self._make = make

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """See `Branch`."""
        return apply(layer, x, self._make(x.device).to(x))


class Bias(Branch):
    """A constant, shape (out,)."""

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

    What torch.compile has compiled runs uncompiled meanwhile (PyTorch 2.6 or newer): compiled code does not see hooks.
    Strength 0 attaches nothing. May be nested; the hooks are gone afterwards, whatever happens inside.

    Yields:
        The layers that have run so far, with their branches.
    """
    reached: set[nn.Module] = set()
    with contextlib.ExitStack() as stack:
        if strength != 0 and branches:
            stack.enter_context(_uncompiled())
            for layer, own in branches.items():
                stack.callback(layer.register_forward_hook(_hook(own, strength, reached)).remove)
        yield reached


def can_run_uncompiled() -> bool:
    """Whether this PyTorch can run compiled code uncompiled for a while."""
    return hasattr(torch.compiler, "set_stance")


def is_convolution(layer: nn.Module) -> bool:
    """By what it has, since hosts bring layers of their own."""
    return hasattr(layer, "stride") and hasattr(layer, "dilation")


def fits(layer: nn.Module) -> bool:
    """Whether a branch can be put beside the layer: a linear layer or a convolution without groups."""
    if is_convolution(layer):
        return getattr(layer, "groups", 1) == 1
    is_linear = hasattr(layer, "in_features") or hasattr(getattr(layer, "weight", None), "quant_state")
    return is_linear and len(weight_shape(layer) or (0, 0)) == 2


def weight_shape(layer: nn.Module) -> tuple[int, ...] | None:
    """The shape of the weight that a layer computes with; None where that cannot be told.

    Weights of four bits and the like are kept packed, two or more in a byte, and their tensors have another shape:
    GGUF's keep the true one as ``tensor_shape``, those of bitsandbytes as ``quant_state.shape``, and linear layers of
    every kind know their sizes themselves.
    """
    sizes: Any = layer
    weight = getattr(layer, "weight", None)
    for stated in (getattr(weight, "tensor_shape", None), getattr(getattr(weight, "quant_state", None), "shape", None)):
        if stated is not None:
            return tuple(stated)
    if hasattr(layer, "in_features") and hasattr(layer, "out_features") and getattr(weight, "ndim", 2) <= 2:
        return (sizes.out_features, sizes.in_features)
    return tuple(weight.shape) if isinstance(weight, Tensor) and weight.is_floating_point() else None


def apply(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's linear map with another weight and no bias, shape (out', in) or (out', in, …)."""
    if not is_convolution(layer):
        return F.linear(x, weight.flatten(1))
    kernel = weight if weight.ndim > 2 else weight.reshape(*weight.shape, *([1] * (x.ndim - 2)))
    convolution = _CONVOLUTIONS[x.ndim]
    return convolution(x, kernel, None, layer.stride, layer.padding, layer.dilation)


def _uncompiled() -> contextlib.AbstractContextManager[None]:
    # Without this module nothing has been compiled, and importing it takes seconds.
    if "torch._dynamo" not in sys.modules or not can_run_uncompiled():
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _hook(
    branches: Sequence[Branch], strength: float, reached: set[nn.Module]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        reached.add(layer)
        for branch in branches:
            output = output + strength * branch(layer, arguments[0])
        return output

    return add
