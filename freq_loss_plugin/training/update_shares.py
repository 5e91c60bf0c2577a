r"""Weights of samples that give each noise level back its share of the updates.

Where images have least timesteps L_i, more updates than the trainer intends are at high noise levels, and fewer at low
ones. With p the trainer's distribution of timesteps, a sample is trained at t with the density

.. math:: p_{gated}(t) = p(t) \operatorname{mean}_i \frac{[t \ge L_i]}{P(t \ge L_i)}, \qquad
          w(t) = \frac{p(t)}{p_{gated}(t)}

w is constant between two least timesteps, and its mean over what is trained is 1. Where few images train at low noise,
each of them would weigh as much as all those that do not. So a weight is at most `MOST`, and the others grow until
the mean is 1 again. Where the distribution depends on the size of latents, images of all sizes count as if they had
the size of the batch.

They are for flow matching and v-prediction. With epsilon prediction the plain loss gives low noise levels far more than
their share of the gradient anyway, and what least timesteps take from them does good (benchmarks/photographs).

Source: importance weights; measurements of this project.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from .least_timesteps import TimestepPools
from .timesteps import Draws

MOST = 10.0


class UpdateShares:
    """The weights of one run.

    Args:
        least: how many samples of an epoch have each least timestep; 0 for those that train at all timesteps.
        pools: tell how probable timesteps are.
    """

    def __init__(self, least: Mapping[int, int], pools: TimestepPools) -> None:
        total = sum(least.values())
        self._fractions = {float(floor): count / total for floor, count in sorted(least.items())}
        self._pools = pools
        self._floors = torch.tensor(list(self._fractions))
        self._tables: dict[Hashable, Tensor] = {}

    def weights(self, timesteps: Tensor, draws: Draws) -> Tensor:
        """w(t) of each sample, shape (B,), float32, on the device of the timesteps.

        Args:
            timesteps: those that the batch trains at, shape (B,).
            draws: how they are drawn.
        """
        tables = torch.stack([self._table(draws, kind) for kind in draws.kinds])
        floors, tables = (tensor.to(timesteps.device, non_blocking=True) for tensor in (self._floors, tables))
        places = torch.bucketize(timesteps.float(), floors, right=True)
        return tables.gather(1, places[:, None])[:, 0]

    def _table(self, draws: Draws, kind: Hashable) -> Tensor:
        """w below the first least timestep, and from each of them on."""
        key = draws.size, kind
        if key not in self._tables:
            # The highest first: it needs the most draws, and the others then use them as well.
            probable = [self._pools.fraction_above(floor, draws, kind) for floor in reversed(self._fractions)]
            above = torch.tensor(probable[::-1], dtype=torch.float64)
            gained = torch.cumsum(torch.tensor(list(self._fractions.values())).double() / above, dim=0)
            trained = (above - torch.cat([above[1:], above.new_zeros(1)])) * gained
            weights = _limited(1 / gained, trained)
            self._tables[key] = torch.cat([weights[:1], weights]).float()
        return self._tables[key]


def _limited(weights: Tensor, masses: Tensor) -> Tensor:
    """The same up to a factor, each at most `MOST`, with a mean of 1.

    Args:
        weights: shape (n,).
        masses: how much of what is trained has each of them, shape (n,).
    """
    masses = masses / masses.sum()
    result = weights / (weights * masses).sum()
    for _ in weights:  # each time at least one more reaches the limit, or all is done
        is_most = result >= MOST
        rest = 1 - MOST * masses[is_most].sum()
        scale = rest / (weights * masses)[~is_most].sum().clamp(min=torch.finfo(weights.dtype).tiny)
        result = torch.where(is_most, MOST, weights * scale)
    return result
