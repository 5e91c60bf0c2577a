"""Latents for which a host draws timesteps, and nothing else: of any size, without the memory and time of it.

The hosts draw timesteps together with noisy latents. Their distributions may depend on the size of the latents, and on
nothing else of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class EmptyLatents(Tensor):
    """Zeros that say that they have shape (count, 1, *size), and hold one number for each of ``count`` samples.

    Whatever is computed from them is an ordinary tensor of what they hold.
    """

    _size: tuple[int, ...]

    @classmethod
    def of(cls, count: int, size: Sequence[int], device: torch.device | str = "cpu") -> EmptyLatents:
        """See `EmptyLatents`.

        Args:
            count: samples.
            size: H and W, after T for videos.
            device: where they are.
        """
        made = torch.zeros(count, 1, *(1 for _ in size), device=device).as_subclass(cls)
        made._size = (count, 1, *size)
        return made

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        arguments: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        """See PyTorch's notes on extending it."""
        with torch._C.DisableTorchFunctionSubclass():
            if function == Tensor.shape.__get__:  # type: ignore[attr-defined]
                return torch.Size(arguments[0]._size)
            if function == Tensor.size:
                size = torch.Size(arguments[0]._size)
                axes = [*arguments[1:], *(named or {}).values()]
                return size[axes[0]] if axes and axes[0] is not None else size
            return function(*arguments, **(named or {}))
