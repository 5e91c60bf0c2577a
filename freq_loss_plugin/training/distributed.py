r"""The batch of all processes: D summed over them, with the gradient that training takes the mean of.

.. math:: D = \sum_p D_p, \qquad \frac{dL}{dD_p} = n \, \frac{dL}{dD}

Every process computes the loss L of the same D, and its gradient reaches the parameters through its own samples. A
trainer averages the gradients of its N processes; with the factor n that average is the gradient of L for one process
with the whole batch.

Processes may be at images of different sizes, of which there is no sum. Then those of one size, n of them, are a
batch; the mean of the processes weighs its L by n/N, as it weighs N local losses. Which is which is agreed upon on the
host, over a group of its own, so that nobody waits for the device.

Source: all-reduce with a gradient as in ``torch.distributed.nn``, whose backward pass would communicate once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

T = TypeVar("T")


def there_are_several() -> bool:
    """Whether this run has more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def process_share(things: Sequence[T]) -> Sequence[T]:
    """Every n-th of them, n being the number of processes: all of them in a single one."""
    return things[dist.get_rank() :: dist.get_world_size()] if there_are_several() else things


def gather(mine: T) -> list[T]:
    """What each process has, in their order; to be called by all of them together."""
    if not there_are_several():
        return [mine]
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine, group=_host_group())
    return everyones


def sum_over_processes(difference: Tensor, batch_size: int, *, mean: bool) -> Tensor:
    """D of the batch of all processes with latents of this size, shape as ``difference``; one all-reduce for each size.

    To be called by all processes together.

    Args:
        difference: D of this process's samples, shape (C, H, W) or (C, T, H, W).
        batch_size: of this process.
        mean: D is a mean over samples, not a sum.
    """
    mine = torch.tensor([*difference.shape, batch_size])
    everyones = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, mine, group=_host_group())
    sizes = [tuple(each.tolist()) for each in everyones]
    same = [size[-1] for size in sizes if size[:-1] == tuple(difference.shape)]
    share = batch_size / sum(same) if mean else 1.0
    shapes = sorted({size[:-1] for size in sizes})
    return cast(Tensor, _Sum.apply(difference, share, len(same), shapes))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, difference: Tensor, share: float, count: int, shapes: list[tuple[int, ...]]) -> Tensor:
        ctx.factor = share * count
        total = difference * share
        for shape in shapes:  # in the same order everywhere
            dist.all_reduce(total if shape == tuple(difference.shape) else difference.new_zeros(shape))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient * ctx.factor, None, None, None


@lru_cache(maxsize=1)
def _host_group() -> Any:
    """Gloo, over which processes speak without their devices; None is the default group, where that is gloo."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
