r"""Base loss and frequency term where both are cheap to compare: their gradients at the model's output.

With g_f the gradient of the weighted term (``dist_match`` included) with respect to the prediction that it was computed
from, and g_b that of the base loss with respect to the base pass's prediction:

**Gradient ratio** (``freq_loss_gradient_ratio``). The term is multiplied by

.. math:: gain = ratio \cdot \sqrt{\frac{E[\lVert g_b \rVert^2]}{E[\lVert g_f \rVert^2]}}

with E an exponential moving average over batches (`DECAY`), corrected for its beginning. So over some tens of batches
the norm of the term's gradient has the stated ratio to that of the base loss, whatever the timestep, the resolution,
the batch size, the model and ``dist_match``; from one batch to the next it may be larger or smaller, as the term is.
Batches without a term, or whose gradient is 0 or not finite, leave the averages alone. The extra pass of ``unified``
comes before the base pass; in the first batch the gradient that plain MSE would have in the extra pass is used in place
of g_b. The gain is within `BOUNDS`. Processes take the mean of the squared norms of those that have a term in a batch,
so that all agree on the gain; samples that are left out of a term count as 0.

**Cosine** (``freq_loss_grad_cosine``). The cosine similarity of g_f and g_b. The extra pass of ``unified`` has a
prediction of its own, at which there is no base loss; there, too, plain MSE is used in its place.

Everything stays on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..loss.params import FrequencyLoss
from ..options.config import FreqLossConfig
from .distributed import there_are_several

# Of the moving averages: about twenty batches.
DECAY = 0.95
BOUNDS = (1e-4, 1e6)


class DetachedTerm(NamedTuple):
    """A term and its gradient with respect to the prediction, neither part of the model's graph."""

    loss: FrequencyLoss
    gradient: Tensor


def detached_term(prediction: Tensor, term: Callable[[Tensor], FrequencyLoss]) -> DetachedTerm:
    """``term(prediction)`` and its gradient, in float32 or better: half precision would lose most of it."""
    exact = prediction.detach().to(torch.promote_types(prediction.dtype, torch.float32)).requires_grad_()
    with torch.enable_grad():
        loss = term(exact)
    (gradient,) = torch.autograd.grad(loss.total, exact)
    return DetachedTerm(FrequencyLoss(*(number.detach() for number in loss)), gradient)


def base_gradient(base_loss: Tensor, prediction: Tensor) -> Tensor:
    """g_b, shape as ``prediction``; the graph stays as it is.

    Scaled by the number of elements on its way, since a mean over them is too small for float16.

    Raises:
        ValueError: the loss was not computed from this very prediction.
    """
    scale = torch.full_like(base_loss, prediction.numel())
    (gradient,) = torch.autograd.grad(base_loss, prediction, scale, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "freq_loss_gradient_ratio and freq_loss_grad_cosine compare gradients at the model's prediction, and this "
            "trainer does not compute its loss from the prediction that its pass returned; leave both out"
        )
    return gradient.float() / prediction.numel()


def mse_gradient(prediction: Tensor, target: Tensor) -> Tensor:
    """The gradient of the mean of (prediction - target)² with respect to the prediction."""
    return 2 / prediction.numel() * (prediction.detach().float() - target.detach().float())


class GradientBalance:
    """Weighs the terms of a run against its base loss.

    Args:
        config: its ``gradient_ratio``, ``grad_cosine`` and ``dist_match`` are used.
    """

    def __init__(self, config: FreqLossConfig) -> None:
        self._config = config
        self.ratio = GradientRatio(config.gradient_ratio) if config.gradient_ratio else None

    @staticmethod
    def is_wanted(config: FreqLossConfig) -> bool:
        """Whether the options ask for any of it."""
        return config.enabled and (bool(config.gradient_ratio) or config.grad_cosine)

    def weigh(
        self, prediction: Tensor, term: DetachedTerm, reference: Tensor, *, same_pass: bool
    ) -> tuple[FrequencyLoss, dict[str, Tensor]]:
        """The term with its gain, again a function of ``prediction``, and what there is to log of it, by name.

        Args:
            prediction: what the term was computed from.
            term: see `detached_term`.
            reference: g_b, or what stands for it in an extra pass: `mse_gradient`.
            same_pass: ``reference`` is g_b, and joins the average; otherwise see `observe_base`.
        """
        logs = {}
        gain = torch.ones((), device=term.gradient.device)
        if self.ratio is not None:
            if same_pass:
                self.ratio.observe(term.gradient.device, base=reference, term=term.gradient)
            else:
                self.ratio.observe(term.gradient.device, term=term.gradient, stand_in=reference)
            gain = self.ratio.gain(term.gradient.device)
            logs["freq_weight"] = gain * self._config.dist_match
        if self._config.grad_cosine:
            logs["freq_grad_cosine"] = F.cosine_similarity(
                term.gradient.flatten(), reference.flatten().to(term.gradient), dim=0
            )
        total = with_gradient(prediction, gain * term.loss.total, gain * term.gradient)
        return term.loss._replace(total=total), logs

    def observe_base(self, gradient: Tensor) -> None:
        """Take g_b of a base pass into the average, where the term has a pass of its own."""
        if self.ratio is not None:
            self.ratio.observe(gradient.device, base=gradient)

    def observe_nothing(self, device: torch.device) -> None:
        """Learn the gradients of the other processes, where this one has no term in a batch."""
        if self.ratio is not None:
            self.ratio.observe(device)


class GradientRatio:
    """Finds the gain of the term, batch by batch.

    Args:
        ratio: the wanted ratio of the norms, above 0.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        # Of base and term: the average of squared norms, and that of 1, which corrects for its beginning.
        self._averages: Tensor | None = None
        self._stand_in: Tensor | None = None

    def observe(
        self,
        device: torch.device,
        *,
        base: Tensor | None = None,
        term: Tensor | None = None,
        stand_in: Tensor | None = None,
    ) -> None:
        """Take gradients of a batch into the averages; to be called by all processes together.

        Args:
            device: that of the gradients.
            base: g_b; None where this process has none in this batch.
            term: g_f; the same.
            stand_in: stands for the base gradient until one has been seen.
        """
        given = [base, term, stand_in]
        squares = [torch.zeros((), device=device) if one is None else _square(one) for one in given]
        sums = torch.stack([*squares, *(torch.full_like(squares[0], one is not None) for one in given)])
        if there_are_several():
            dist.all_reduce(sums)
        means = sums[:3] / sums[3:].clamp(min=1)
        averages = torch.zeros(2, 2, device=device) if self._averages is None else self._averages.to(device)
        moved = torch.lerp(averages, torch.stack([means[:2], torch.ones_like(means[:2])], dim=1), 1 - DECAY)
        usable = means[:2].isfinite() & (means[:2] > 0)
        self._averages = torch.where(usable[:, None], moved, averages)
        self._stand_in = means[2] if stand_in is not None else None

    def gain(self, device: torch.device) -> Tensor:
        """What multiplies the term now; a scalar."""
        if self._averages is None:
            return torch.ones((), device=device)
        sums, weights = self._averages.to(device).unbind(dim=1)
        base = sums[0] / weights[0]
        if self._stand_in is not None:
            base = torch.where(weights[0] > 0, base, self._stand_in.to(device))
        ratio = (base * weights[1] / sums[1]).sqrt()
        return torch.where(ratio > 0, (self._ratio * ratio).clamp(*BOUNDS), torch.ones_like(ratio))

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, on the CPU; empty before the first batch."""
        return {} if self._averages is None else {"averages": self._averages.to("cpu", copy=True)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> bool:
        """Go on with what `state_dict` returned; False where it is something else."""
        averages = state.get("averages")
        if averages is None or averages.shape != (2, 2):
            return False
        self._averages = averages.clone()
        return True


def _square(gradient: Tensor) -> Tensor:
    return gradient.detach().float().square().sum()


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
    @once_differentiable
    def backward(ctx: Any, of_value: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (of_value * gradient).to(ctx.dtype), None, None
