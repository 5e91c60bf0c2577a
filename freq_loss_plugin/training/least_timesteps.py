"""Timesteps of images that train only above a noise level.

A sample whose least timestep is L trains at t ~ p(t | t >= L), p being the trainer's own distribution. Its first draw
stays where it already is above, and samples without a least timestep keep theirs.

To draw below L again and again would call the trainer's function hundreds of times in a batch. Instead `DRAWN`
timesteps are drawn from it once, the first time that one is needed, and kept sorted: those from L on are a sample of
p(t | t >= L), from which one is picked. All of this has random streams of its own, so nothing else in a run changes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from .random_streams import named_generator, separate_random_stream
from .timesteps import Draws

_CPU = torch.device("cpu")
# Of these, some 450 are above the highest least timestep, 900, where timesteps are drawn from a logit-normal.
DRAWN = 2**15
_SAMPLE = 16


class TimestepPools:
    """Timesteps of each distribution of a run, drawn in advance.

    Args:
        stream: names the random stream of the draws.
    """

    def __init__(self, stream: str) -> None:
        self._stream = stream
        self._pools: dict[Hashable, Tensor] = {}
        # Some draws in one random stream are the same where the distribution is.
        self._of_sample: dict[tuple[float, ...], Tensor] = {}

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
                pool = self._pool((draws.size, kind), draws.of_kind(kind))
                picked[of_kind] = _pick(pool, picked[of_kind], chance[of_kind])
        return picked

    def _pool(self, key: Hashable, draw: Callable[[int], Tensor]) -> Tensor:
        """Sorted draws, float32; the same ones for all sizes on which the distribution does not depend."""
        if key not in self._pools:
            with separate_random_stream(self._stream, _CPU):
                sample = tuple(draw(_SAMPLE).tolist())
            if sample not in self._of_sample:
                with separate_random_stream(f"{self._stream}:{len(self._of_sample)}", _CPU):
                    self._of_sample[sample] = draw(DRAWN).float().sort().values
            self._pools[key] = self._of_sample[sample]
        return self._pools[key]


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
