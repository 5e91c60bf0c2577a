r"""The batch of all processes: D summed over them, with the gradient that training takes the mean of.

.. math:: D = \sum_p D_p, \qquad \frac{dL}{dD_p} = n \, \frac{dL}{dD}

Every process computes the loss L of the same D, and its gradient reaches the parameters through its own samples. A
trainer averages the gradients of its N processes; with the factor n that average is the gradient of L for one process
with the whole batch.

Processes may be at images of different sizes, of which there is no sum. Then those of one size, n of them, are a
batch; the mean of the processes weighs its L by n/N, as it weighs N local losses. Where timesteps depend on the size,
some of them may have no term in a batch. So in every batch all processes first tell each other what they have
(`gather_parts`), on the host over a group of its own, so that nobody waits for the device; what follows depends on the
answers alone, which are the same everywhere. A communication that only one process decides on would wait forever.

Source: all-reduce with a gradient as in ``torch.distributed.nn``, whose backward pass would communicate once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

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


class Parts(NamedTuple):
    """What the processes have for the term of one batch.

    Attributes:
        mine: the shape of this process's D, (C, H, W) or (C, T, H, W).
        samples: for each process, in their order, the shape of its D and the size of its batch; 0 without a term.
    """

    mine: tuple[int, ...]
    samples: Sequence[tuple[tuple[int, ...], int]]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of which there are terms, in the same order in all processes."""
        return sorted({shape for shape, count in self.samples if count})


def gather_parts(prediction: Tensor, *, has_term: bool = True) -> Parts:
    """Exchange what each process has for a term; to be called by all of them, with every batch that may have one.

    Args:
        prediction: of this process's batch, shape (B, C, H, W) or (B, C, T, H, W).
        has_term: whether it is part of a term.
    """
    mine, samples = tuple(prediction.shape[1:]), len(prediction) if has_term else 0
    if not there_are_several():
        return Parts(mine, [(mine, samples)])
    row = torch.tensor([*mine, samples])
    rows = [torch.zeros_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row, group=_host_group())
    numbers = [row.tolist() for row in rows]
    return Parts(mine, [(tuple(each[:-1]), each[-1]) for each in numbers])


def sum_over_processes(difference: Tensor, parts: Parts, *, mean: bool) -> Tensor:
    """D of the batch of all processes with latents of this size, shape as ``difference``; one all-reduce for each size.

    To be called by all processes that have a term, while the others call `add_nothing`.

    Args:
        difference: D of this process's samples, shape (C, H, W) or (C, T, H, W).
        parts: what `gather_parts` returned.
        mean: D is a mean over samples, not a sum.
    """
    if not there_are_several():
        return difference
    same = [count for shape, count in parts.samples if shape == parts.mine and count]
    share = parts.samples[dist.get_rank()][1] / sum(same) if mean else 1.0
    return cast(Tensor, _Sum.apply(difference, share, len(same), parts))


def add_nothing(parts: Parts, like: Tensor) -> None:
    """Take part in the sums of the other processes, without a term of one's own.

    Args:
        parts: what `gather_parts` returned.
        like: a tensor on the device and of the dtype of D.
    """
    for shape in parts.shapes:
        dist.all_reduce(like.new_zeros(shape))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, difference: Tensor, share: float, count: int, parts: Parts) -> Tensor:
        ctx.factor = share * count
        total = difference * share
        for shape in parts.shapes:  # in the same order everywhere
            dist.all_reduce(total if shape == parts.mine else difference.new_zeros(shape))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient * ctx.factor, None, None, None


@lru_cache(maxsize=1)
def _host_group() -> Any:
    """A gloo group for tensors on the CPU; None is the default group, where that is gloo."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
