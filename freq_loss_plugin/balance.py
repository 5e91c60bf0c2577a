r"""Base loss and frequency term where both are cheap to compare: their gradients at the model's output.

With g_f the gradient of the weighted term (``dist_match`` included) with respect to the prediction that it was computed
from, and g_b that of the base loss with respect to the base pass's prediction:

**Share** (``freq_loss_share``). The term is multiplied by

.. math:: gain = share \cdot \sqrt{\frac{E[\lVert g_b \rVert^2]}{E[\lVert g_f \rVert^2]}}

with E an exponential moving average over batches (`DECAY`), corrected for its beginning. So over some tens of batches
the term's gradient has the stated share of the base loss's, whatever the timestep, the resolution, the batch size, the
model and ``dist_match``; from one batch to the next it may be larger or smaller, as the term is. Batches without a
term, or whose gradient is 0 or not finite, leave the averages alone. The gain is 1 until both averages exist, and
within `BOUNDS`. Processes take the mean of their squared norms, so that they agree on the gain.

**Cosine** (``freq_loss_grad_cosine``). Of the angle between g_f and g_b: above 0 they pull the same way. The extra pass
of ``unified`` has a prediction of its own, at which there is no base loss; there g_b is the gradient that plain MSE
would have, 2·(prediction - target) up to scale.

Everything stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .config import FreqLossConfig
from .loss import FrequencyLoss
from .processes import there_are_several

# Of the moving averages: about twenty batches.
DECAY = 0.95
BOUNDS = (1e-4, 1e6)


class DetachedTerm(NamedTuple):
    """A term and its gradient with respect to the prediction, neither part of the model's graph."""

    loss: FrequencyLoss
    gradient: Tensor


class Weighed(NamedTuple):
    """A term as it joins the base loss, and what there is to log of it, by name."""

    loss: FrequencyLoss
    logs: dict[str, Tensor]


def detached_term(prediction: Tensor, term: Callable[[Tensor], FrequencyLoss]) -> DetachedTerm:
    """``term(prediction)`` and its gradient, in float32 or better: half precision would lose most of it."""
    exact = prediction.detach().to(torch.promote_types(prediction.dtype, torch.float32)).requires_grad_()
    with torch.enable_grad():
        loss = term(exact)
    (gradient,) = torch.autograd.grad(loss.total, exact)
    return DetachedTerm(FrequencyLoss(*(number.detach() for number in loss)), gradient)


def base_gradient(base_loss: Tensor, prediction: Tensor) -> Tensor | None:
    """g_b, which leaves the graph as it is; None where the loss was not computed from this very prediction.

    Scaled by the number of elements on its way, since a mean over them is too small for float16.
    """
    scale = torch.full_like(base_loss, prediction.numel())
    (gradient,) = torch.autograd.grad(base_loss, prediction, scale, retain_graph=True, allow_unused=True)
    return None if gradient is None else gradient.float() / prediction.numel()


class Balance:
    """Weighs the terms of one training against its base loss.

    Args:
        config: its ``share``, ``grad_cosine`` and ``dist_match`` are used.
    """

    def __init__(self, config: FreqLossConfig) -> None:
        self._config = config
        self.share = GradientShare(config.share) if config.share else None

    @staticmethod
    def is_wanted(config: FreqLossConfig) -> bool:
        """Whether the options ask for any of it."""
        return config.enabled and (bool(config.share) or config.grad_cosine)

    def weigh(self, prediction: Tensor, term: DetachedTerm, beside: Tensor, *, same_pass: bool) -> Weighed:
        """The term, now a function of ``prediction``.

        Args:
            prediction: what the term was computed from.
            term: see `detached_term`.
            beside: what the cosine is taken with: g_b, or the residual of the extra pass.
            same_pass: ``beside`` is g_b of this batch, and joins the average; otherwise see `observe_base`.
        """
        logs = {}
        gain = torch.ones((), device=term.gradient.device)
        if self.share is not None:
            self.share.observe(base=beside if same_pass else None, term=term.gradient)
            gain = self.share.gain(term.gradient.device)
            logs["weight"] = gain * self._config.dist_match
        if self._config.grad_cosine:
            logs["grad_cosine"] = F.cosine_similarity(
                term.gradient.flatten(), beside.flatten().to(term.gradient), dim=0
            )
        total = with_gradient(prediction, gain * term.loss.total, gain * term.gradient)
        return Weighed(term.loss._replace(total=total), logs)

    def observe_base(self, gradient: Tensor) -> None:
        """Take g_b of a base pass into the average, where the term has a pass of its own."""
        if self.share is not None:
            self.share.observe(base=gradient)


class GradientShare:
    """Finds the gain of the term, batch by batch.

    Args:
        share: the wanted ratio of the norms, above 0.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        # Of base and term: the average of squared norms, and that of 1, which corrects for its beginning.
        self._averages: Tensor | None = None

    def observe(self, *, base: Tensor | None = None, term: Tensor | None = None) -> None:
        """Take gradients of a batch into the averages; by all processes together, with the same arguments present."""
        given = [gradient for gradient in (base, term) if gradient is not None]
        squares = torch.stack([gradient.detach().float().square().sum() for gradient in given])
        if there_are_several():
            dist.all_reduce(squares)
            squares = squares / dist.get_world_size()
        averages = torch.zeros(2, 2, device=squares.device) if self._averages is None else self._averages
        averages = averages.to(squares.device)
        rows = [row for row, gradient in enumerate((base, term)) if gradient is not None]
        for row, square in zip(rows, squares, strict=True):
            moved = torch.lerp(averages[row], torch.stack([square, torch.ones_like(square)]), 1 - DECAY)
            averages[row] = torch.where(square.isfinite() & (square > 0), moved, averages[row])
        self._averages = averages

    def gain(self, device: torch.device) -> Tensor:
        """What multiplies the term now; a scalar."""
        if self._averages is None:
            return torch.ones((), device=device)
        sums, weights = self._averages.to(device).unbind(dim=1)
        ratio = (sums[0] * weights[1] / (sums[1] * weights[0])).sqrt()
        return torch.where(weights.min() > 0, (self._share * ratio).clamp(*BOUNDS), torch.ones_like(ratio))

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, on the CPU; empty before the first batch."""
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
        ctx.dtype = prediction.dtype
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, of_value: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (of_value * gradient).to(ctx.dtype), None, None
