r"""The frequency term held at a share of the base loss, measured where both are cheap: at the model's output.

With g_f the gradient of the weighted term (``dist_match`` included) with respect to the prediction that it was computed
from, and g_b that of the base loss with respect to the base pass's prediction, the term is multiplied by

.. math:: gain = share \cdot \sqrt{\frac{E[\lVert g_b \rVert^2]}{E[\lVert g_f \rVert^2]}}

with E an exponential moving average over batches (`DECAY`), corrected for its beginning. So over some tens of batches
the term's gradient has the stated share of the base loss's, whatever the timestep, the resolution, the batch size, the
model and ``dist_match``; from one batch to the next it may be larger or smaller, as the term is. Batches without a term,
or whose gradient is 0 or not finite, leave the averages alone. The gain is 1 until both averages exist, and within
`BOUNDS`.

Everything stays on the device. Processes take the mean of their squared norms, so that they agree on the gain.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .loss import FrequencyLoss
from .processes import there_are_several

# Of the moving averages: about twenty batches.
DECAY = 0.95
BOUNDS = (1e-4, 1e6)


class Propagation(NamedTuple):
    """A term, and its gradient with respect to the prediction, as yet not propagated into the model."""

    loss: FrequencyLoss
    gradient: Tensor


class GradientShare:
    """Finds the gain of the term, batch by batch.

    Args:
        share: the wanted ratio of the norms, above 0.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        # Of base and term: the average of squared norms, and of 1, which is what corrects it.
        self._averages: Tensor | None = None

    def observe(self, *, base: Tensor | None = None, term: Tensor | None = None) -> None:
        """Take gradients of a batch into the averages; by all processes together, with the same arguments present."""
        given = [gradient for gradient in (base, term) if gradient is not None]
        squares = torch.stack([gradient.detach().float().square().sum() for gradient in given])
        if there_are_several():
            dist.all_reduce(squares)
            squares = squares / dist.get_world_size()
        if self._averages is None:
            self._averages = squares.new_zeros(2, 2)
        self._averages = self._averages.to(squares.device)
        rows = [row for row, gradient in enumerate((base, term)) if gradient is not None]
        for row, square in zip(rows, squares, strict=True):
            moved = torch.lerp(self._averages[row], torch.stack([square, torch.ones_like(square)]), 1 - DECAY)
            usable = square.isfinite() & (square > 0)
            self._averages[row] = torch.where(usable, moved, self._averages[row])

    def gain(self, device: torch.device) -> Tensor:
        """What multiplies the term now; a scalar."""
        if self._averages is None:
            return torch.ones((), device=device)
        sums, weights = self._averages.to(device).unbind(dim=1)
        ratio = (sums[0] * weights[1] / (sums[1] * weights[0])).sqrt()
        return torch.where(weights.min() > 0, (self._share * ratio).clamp(*BOUNDS), torch.ones_like(ratio))

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, on the CPU."""
        return {} if self._averages is None else {"averages": self._averages.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with what `state_dict` returned."""
        self._averages = state.get("averages")


def with_gradient(prediction: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value``, whose gradient with respect to ``prediction`` is ``gradient``."""
    return cast(Tensor, _WithGradient.apply(prediction, value, gradient))


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, of_value: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return of_value * gradient, None, None
