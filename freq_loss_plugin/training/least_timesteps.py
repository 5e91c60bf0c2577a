"""Timesteps of images that train only above a noise level.

A sample whose least timestep is L trains at t ~ p(t | t >= L), p being the trainer's own distribution. Its first draw
stays where it already is above, and samples without a least timestep keep theirs.

To draw below L again and again would call the trainer's function hundreds of times in a batch. Instead `DRAWN`
timesteps are drawn from it once, the first time that one is needed (more where few lie above the highest L of the run),
and kept sorted: those from L on are a sample of p(t | t >= L), from which one is picked. All of this has random streams
of its own, so nothing else in a run changes; what is drawn does not depend on which images came first, so a resumed run
picks the same.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_left
from collections.abc import Hashable

import torch
from torch import Tensor

from .random_streams import separate_random_stream
from .timesteps import Draws

_CPU = torch.device("cpu")
# So many at a time, until so many are above a least timestep, whose distribution is then exact to some 0.9 / sqrt(4096)
# in the sense of Kolmogorov and Smirnov; and at most so many.
DRAWN, _FEWEST_ABOVE, MOST_DRAWN = 2**15, 4096, 2**18
_SAMPLE = 16


class TimestepPools:
    """Timesteps of each distribution of a run, drawn in advance.

    Args:
        stream: names the random stream of the draws.
        highest: the highest least timestep of the run.
    """

    def __init__(self, stream: str, highest: float = 0.0) -> None:
        self._stream, self._highest = stream, highest
        # Of each size and kind some draws in one random stream: the same where the distribution is.
        self._samples: dict[Hashable, tuple[float, ...]] = {}
        self._pools: dict[tuple[float, ...], array[float]] = {}

    def above(self, least: Tensor, draws: Draws, stream: str) -> Tensor:
        """One timestep for each sample, from its distribution above its least timestep.

        Args:
            least: shape (B,), on the CPU.
            draws: of the batch.
            stream: names the random stream of the picks.

        Returns:
            Shape (B,), float32, on the CPU. Where a distribution has nothing above a least timestep, that itself.
        """
        chances = random.Random(stream)
        # Plain numbers: for a few samples, tensors would take several times as long.
        return torch.tensor(
            [
                self._pick(floor, draws, kind, chances.random()) if floor > 0 else 0.0
                for floor, kind in zip(least.tolist(), draws.kinds, strict=True)
            ]
        )

    def fraction_above(self, least: float, draws: Draws, kind: Hashable) -> float:
        """The probability of a timestep of at least ``least``; where none was drawn, that of one of them.

        Args:
            least: on the scale 0..1000.
            draws: of a batch.
            kind: names a distribution of it.
        """
        pool = self._pool(least, draws, kind)
        return max(1, len(pool) - bisect_left(pool, least)) / len(pool)

    def _pick(self, floor: float, draws: Draws, kind: Hashable, chance: float) -> float:
        pool = self._pool(floor, draws, kind)
        first = bisect_left(pool, floor)
        return pool[first + int(chance * (len(pool) - first))] if first < len(pool) else floor

    def _pool(self, floor: float, draws: Draws, kind: Hashable) -> array[float]:
        """The timesteps of one distribution, enough of them above the run's highest floor and this one."""
        sample, highest = self._sample(draws, kind), max(floor, self._highest)
        pool = self._pools.get(sample, array("d"))
        while len(pool) - bisect_left(pool, highest) < _FEWEST_ABOVE and len(pool) < MOST_DRAWN:
            with separate_random_stream(f"{self._stream}:{sample}:{len(pool)}", _CPU):
                pool = array("d", sorted([*pool, *draws.of_kind(kind)(DRAWN).tolist()]))
            self._pools[sample] = pool
        return pool

    def _sample(self, draws: Draws, kind: Hashable) -> tuple[float, ...]:
        """By which pools are known, so that there is one for all sizes of latents that do not matter."""
        key = draws.size, kind
        if key not in self._samples:
            with separate_random_stream(self._stream, _CPU):
                self._samples[key] = tuple(draws.of_kind(kind)(_SAMPLE).tolist())
        return self._samples[key]


def raised(timesteps: Tensor, least: Tensor, above: Tensor) -> Tensor:
    """``timesteps`` where they are at least ``least``, elsewhere ``above``; all of shape (B,), on any device."""
    device = timesteps.device
    least, above = (values.to(device, non_blocking=True) for values in (least, above))
    return torch.where(timesteps < least, above.to(timesteps.dtype), timesteps)
