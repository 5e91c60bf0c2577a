"""Timesteps of images that train only above a noise level: drawn again until they are there.

A sample whose least timestep is L trains at t ~ p(t | t >= L), p being the trainer's own distribution. Its first draw
stays where it already is above, and samples without a least timestep keep theirs; what is drawn again comes from a
random stream of its own, so that nothing else in a run changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .random_streams import separate_random_stream

_CPU = torch.device("cpu")
# Where a distribution has next to nothing above a least timestep, that timestep itself is taken in the end.
_MOST_DRAWS = 500


def draw_above(draw: Callable[[], Tensor], least: Tensor, stream: str) -> Tensor:
    """One timestep for each sample, from its distribution above its least timestep.

    Args:
        draw: timesteps of all samples, shape (n, B), n of them for each, on the CPU and the scale 0..1000, from torch's
            default generator.
        least: shape (B,), on the CPU.
        stream: names the random stream.

    Returns:
        Shape (B,), on the CPU; of the dtype of ``draw``'s.
    """
    with separate_random_stream(stream, _CPU):
        drawn = draw()
        found, pending = drawn[0].clone(), torch.ones(len(least), dtype=torch.bool)
        for _ in range(_MOST_DRAWS):
            above = drawn >= least
            first = above.to(torch.int8).argmax(dim=0)
            hits = pending & above.any(dim=0)
            found = torch.where(hits, drawn.gather(0, first[None])[0], found)
            pending &= ~hits
            if not pending.any():
                break
            drawn = draw()
    return torch.where(pending, least.to(found.dtype), found)


def several_of(draw: Callable[[int], Tensor], count: int) -> Callable[[], Tensor]:
    """What `draw_above` takes, where all ``count`` samples draw from one distribution: ``draw`` of n timesteps."""
    return lambda: draw(8 * count).view(8, count)


def raised(timesteps: Tensor, least: Tensor, above: Tensor) -> Tensor:
    """``timesteps`` where they are at least ``least``, elsewhere ``above``; all of shape (B,), on any device."""
    device = timesteps.device
    least, above = (values.to(device, non_blocking=True) for values in (least, above))
    return torch.where(timesteps < least, above.to(timesteps.dtype), timesteps)
