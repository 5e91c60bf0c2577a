"""Timesteps of images that train only above a noise level.

A sample whose least timestep is L trains at t ~ p(t | t >= L), p being the trainer's own distribution. Its first draw
stays where it already is above, and samples without a least timestep keep theirs.

To draw below L again and again would call the trainer's function hundreds of times in a batch. Instead `DRAWN`
timesteps are drawn from it once, the first time that one is needed (more where few lie above L), and kept sorted: those
from L on are a sample of p(t | t >= L), from which one is picked. All of this has random streams of its own, so nothing
else in a run changes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .random_streams import named_generator, separate_random_stream
from .timesteps import Draws

_CPU = torch.device("cpu")
# So many at a time, until so many are above a least timestep: of a logit-normal, some 450 of the first are above 900.
DRAWN, _FEWEST_ABOVE, MOST_DRAWN = 2**15, 256, 2**18
_SAMPLE = 16


class TimestepPools:
    """Timesteps of each distribution of a run, drawn in advance.

    Args:
        stream: names the random stream of the draws.
    """

    def __init__(self, stream: str) -> None:
        self._stream = stream
        # Of each size and kind some draws in one random stream: the same where the distribution is.
        self._samples: dict[Hashable, tuple[float, ...]] = {}
        self._pools: dict[tuple[float, ...], Tensor] = {}

    def above(self, least: Tensor, draws: Draws, stream: str) -> Tensor:
        """One timestep for each sample, from its distribution above its least timestep.

        Args:
            least: shape (B,), on the CPU.
            draws: of the batch.
            stream: names the random stream of the picks.

        Returns:
            Shape (B,), on the CPU. Where a distribution has nothing above a least timestep, that itself.
        """
        chance = torch.rand(len(least), generator=named_generator(stream), dtype=torch.float64)
        picked = least.to(torch.float32, copy=True)
        for kind in set(draws.kinds):
            of_kind = torch.tensor([kind == each for each in draws.kinds]) & (least > 0)
            if of_kind.any():
                pool = self._pool((draws.size, kind), draws.of_kind(kind), float(picked[of_kind].max()))
                picked[of_kind] = _pick(pool, picked[of_kind], chance[of_kind])
        return picked

    def _pool(self, key: Hashable, draw: Callable[[int], Tensor], least: float) -> Tensor:
        """Sorted draws, float32, with enough from ``least`` on; one pool for all sizes that do not matter."""
        if key not in self._samples:
            with separate_random_stream(self._stream, _CPU):
                self._samples[key] = tuple(draw(_SAMPLE).tolist())
        sample = self._samples[key]
        pool = self._pools.get(sample, torch.empty(0))
        while len(pool) < MOST_DRAWN and int((pool >= least).sum()) < _FEWEST_ABOVE:
            with separate_random_stream(f"{self._stream}:{sample}:{len(pool)}", _CPU):
                pool = torch.cat([pool, draw(DRAWN).float()]).sort().values
            self._pools[sample] = pool
        return pool


def _pick(pool: Tensor, least: Tensor, chance: Tensor) -> Tensor:
    """One of the timesteps from ``least`` on for each sample, ``chance`` in 0..1 saying which."""
    first = torch.searchsorted(pool, least)
    index = first + (chance * (len(pool) - first)).long()
    return torch.where(first < len(pool), pool[index.clamp(max=len(pool) - 1)], least)


def raised(timesteps: Tensor, least: Tensor, above: Tensor) -> Tensor:
    """``timesteps`` where they are at least ``least``, elsewhere ``above``; all of shape (B,), on any device."""
    device = timesteps.device
    least, above = (values.to(device, non_blocking=True) for values in (least, above))
    return torch.where(timesteps < least, above.to(timesteps.dtype), timesteps)
