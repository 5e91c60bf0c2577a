r"""Earlier batches, matched together with the current one, so that more images count than a small batch holds.

With D_0 the residual sum of the current batch (see `freq_loss_plugin.loss.energies`), D_1, D_2, ... those of the
batches before it, K = ``freq_loss_batch_history`` and the decay r = ``freq_loss_history_decay``, the bands are those of

.. math:: D = \sum_{j=0}^{K} r^j D_j \;(sum), \qquad D = \frac{\sum_j r^j D_j}{\sum_j r^j} \;(mean)

Only batches of the same latent size count; fewer than K while there are fewer. D_1, ... are constants: the gradient is
dL/dD in D_0 alone, so a residual that persists over batches pulls harder, and one that alternates is left alone. They
were made by the weights of their time; the further back, the staler, which is what the decay is for.

Every batch is an entry, those of one optimizer step under gradient accumulation, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from torch import Tensor

from ..options.config import FreqLossConfig


class BatchHistory:
    """The residual sums of the last K batches of each latent size.

    Args:
        config: its ``batch_history``, ``history_decay`` and ``reduction`` are used.
    """

    def __init__(self, config: FreqLossConfig) -> None:
        self._config = config
        self._past: dict[tuple[int, ...], deque[Tensor]] = {}

    def join(self, difference: Tensor) -> Tensor:
        """D of this batch and those before it, shape as ``difference``, which is remembered."""
        past = self._past.setdefault(tuple(difference.shape), deque(maxlen=self._config.batch_history))
        joined, weight, total = difference, 1.0, 1.0
        for earlier in past:
            weight *= self._config.history_decay
            joined = joined.add(earlier.to(difference), alpha=weight)
            total += weight
        past.appendleft(difference.detach().clone())
        return joined / total if self._config.reduction == "mean" else joined

    def state_dict(self) -> dict[str, Tensor]:
        """What is remembered, on the CPU: size and age to D."""
        return {
            f"{'x'.join(map(str, shape))}.{age:04d}": earlier.cpu()
            for shape, past in self._past.items()
            for age, earlier in enumerate(past)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Remember what `state_dict` returned, as far as K reaches."""
        self._past.clear()
        for name in sorted(state, reverse=True):  # the oldest first
            past = self._past.setdefault(tuple(state[name].shape), deque(maxlen=self._config.batch_history))
            past.appendleft(state[name])
