"""At which timesteps a batch is trained: one for an extra pass, or one that the batch shares."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..loss.sample_weights import in_window
from ..options.config import FreqLossConfig
from .random_streams import separate_random_stream

_CPU = torch.device("cpu")


class SampleDistributions(NamedTuple):
    """The distributions of a batch whose samples draw their timesteps from different ones.

    Attributes:
        draw: one timestep for each sample, from its own distribution, shape (B,), on the CPU and the scale 0..1000.
        density_ratio: for one timestep per sample, shape (B,), the density of the sample's own distribution over that
            of the base distribution, float64.
        kinds: names each sample's distribution, B of them.
        draw_kind: for one of these, n timesteps from it, shape (n,).
    """

    draw: Callable[[], Tensor]
    density_ratio: Callable[[Tensor], Tensor]
    kinds: Sequence[Hashable]
    draw_kind: Callable[[Hashable, int], Tensor]


class Draws(NamedTuple):
    """How a trainer draws the timesteps of a batch, all on the scale 0..1000.

    Attributes:
        own: those that it drew for this batch, shape (B,), on its device.
        draw: n timesteps from the base distribution, shape (n,), on the CPU, from torch's default generator.
        size: the size of the latents, (H, W) or (T, H, W), on which the base distribution may depend.
        per_sample: the samples' distributions where they differ from the base one.
    """

    own: Tensor
    draw: Callable[[int], Tensor]
    size: tuple[int, ...] = ()
    per_sample: SampleDistributions | None = None

    @property
    def kinds(self) -> Sequence[Hashable]:
        """Names each sample's distribution, B of them."""
        return [None] * len(self.own) if self.per_sample is None else self.per_sample.kinds

    def of_kind(self, kind: Hashable) -> Callable[[int], Tensor]:
        """How n timesteps are drawn from one of these."""
        return self.draw if self.per_sample is None else functools.partial(self.per_sample.draw_kind, kind)


def unified_timestep(config: FreqLossConfig, stream: str) -> int:
    """The one timestep of an extra pass: uniform over min_timestep <= t < max_timestep.

    It depends on the name of its random stream only, so that all processes agree on it and a resumed run continues the
    sequence.
    """
    return random.Random(stream).randrange(config.min_timestep, config.max_timestep)


def shared_timesteps(
    draw: Callable[[int], Tensor], count: int, config: FreqLossConfig, name: str, process: int = 0
) -> tuple[Tensor, float | None]:
    """Timesteps of a batch that shares one where it lies in the window, each sample's distribution being the base one.

    One timestep is drawn from the base distribution. If min_timestep <= t < max_timestep, the whole batch takes it,
    which so happens with the window's own probability; otherwise every sample draws for itself until it is outside. So
    a sample's t is inside with the right probability and, given that, distributed as the base distribution is there;
    only the samples of one batch depend on each other.

    Args:
        draw: n timesteps from the base distribution, shape (n,), on the CPU and the scale 0..1000, from torch's default
            generator.
        count: samples in the batch.
        config: its window is used.
        name: of the random stream; every process of a run that passes the same one takes the same decision.
        process: number of this process; outside the window each draws for itself.

    Returns:
        Timesteps of shape (count,), and the shared one or None.
    """
    with separate_random_stream(name, _CPU):
        first = draw(1)
    if _inside(first, config).item():
        return first.expand(count), first.item()
    outside: list[Tensor] = []
    with separate_random_stream(f"{name}:{process}", _CPU):
        while sum(map(len, outside)) < count:
            drawn = draw(max(count, 8))
            outside.append(drawn[~_inside(drawn, config)])
    return torch.cat(outside)[:count], None


def coupled_timesteps(
    draw: Callable[[int], Tensor], per_sample: SampleDistributions, config: FreqLossConfig, name: str, process: int = 0
) -> tuple[Tensor, float | None, Tensor]:
    """`shared_timesteps` where samples have distributions of their own: as many as possible take the shared timestep.

    The shared timestep t is drawn from the base distribution p, the same in all processes. If it is in the window,
    sample i takes it with probability min(1, p_i(t) / p(t)), which is the maximal coupling of both; otherwise it draws
    from what is left of p_i. So each sample's timestep is distributed as p_i.

    Args:
        draw: n timesteps from the base distribution, as for `shared_timesteps`.
        per_sample: the samples' distributions.
        config: its window is used.
        name: of the random stream.
        process: number of this process.

    Returns:
        Timesteps of shape (B,), the shared one or None, and which samples take it, shape (B,), boolean.
    """
    with separate_random_stream(name, _CPU):
        first = draw(1)
    with separate_random_stream(f"{name}:{process}", _CPU):
        timesteps = per_sample.draw()
        chance = torch.rand(len(timesteps), dtype=torch.float64)
        takes = _inside(first, config) & (chance < per_sample.density_ratio(first.expand(len(timesteps))))
        pending = ~takes
        while True:
            # What is left of p_i: outside the window all of it, inside p_i - min(p_i, p).
            chance = torch.rand(len(timesteps), dtype=torch.float64)
            pending &= _inside(timesteps, config) & (chance * per_sample.density_ratio(timesteps) < 1)
            if not pending.any():
                break
            timesteps = torch.where(pending, per_sample.draw(), timesteps)
    shared = first.item() if _inside(first, config).item() else None
    return torch.where(takes, first.expand(len(timesteps)), timesteps), shared, takes


def _inside(timesteps: Tensor, config: FreqLossConfig) -> Tensor:
    """Which timesteps lie in the window: min_timestep <= t < max_timestep."""
    return in_window(timesteps, (config.min_timestep, config.max_timestep))
