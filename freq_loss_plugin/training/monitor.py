"""The numbers of the term, read without waiting for the device and checked before the optimizer runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..loss.params import FrequencyLoss
from .messages import Message
from .passes import Pass


class NonFiniteLossError(RuntimeError):
    """The frequency term became NaN or infinite; raised before the optimizer sees it."""


class DeferredScalars:
    """A few scalars on their way from the device to the host, without anyone waiting for them.

    On CUDA they are copied into pinned memory behind the work already queued; `read` then waits for that copy alone,
    not for what was queued after it.
    """

    def __init__(self, *scalars: Tensor) -> None:
        self._values = torch.stack([scalar.detach().float() for scalar in scalars])
        self._arrived: Any = None
        if self._values.is_cuda:
            on_host = torch.empty(self._values.shape, dtype=self._values.dtype, pin_memory=True)
            self._values = on_host.copy_(self._values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """The values as Python numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


class StepMetrics(NamedTuple):
    """Numbers on the host: the base loss, L_low, L_high, the weighted term, others by name, and what to say of them."""

    base: float
    low: float
    high: float
    total: float
    others: Mapping[str, float] = MappingProxyType({})
    message: Message | None = None

    @property
    def fraction(self) -> float:
        """The term's fraction of the whole loss, 0 to 1."""
        return self.total / (self.base + self.total) if self.base + self.total else 0.0

    def logs(self, *, has_term: bool = True) -> dict[str, float]:
        """As TensorBoard and W&B show them; without a frequency term the others alone."""
        others = {f"loss/{name}": value for name, value in self.others.items()}
        if not has_term:
            return others
        return {
            "loss/freq_low": self.low,
            "loss/freq_high": self.high,
            "loss/freq_total": self.total,
            "loss/freq_fraction": self.fraction,
            **others,
        }

    @classmethod
    def mean(cls, batches: Sequence[StepMetrics]) -> StepMetrics:
        """Those of an optimizer step over several batches."""
        base, low, high, total = (sum(v) / len(batches) for v in zip(*(each[:4] for each in batches), strict=True))
        of_name: dict[str, list[float]] = {}
        for each in batches:
            for name, value in each.others.items():
                of_name.setdefault(name, []).append(value)
        others = {name: sum(values) / len(values) for name, values in of_name.items()}
        return cls(base, low, high, total, others)


class _Pending(NamedTuple):
    """A term that is part of a loss, but whose numbers the host has not seen yet."""

    scalars: DeferredScalars
    names: tuple[str, ...]
    passed: Pass


class TermMonitor:
    """Keeps the terms of a step until their numbers have arrived, and stops a run that they show to be broken."""

    def __init__(self) -> None:
        self._pending: list[_Pending] = []

    def add(self, base_loss: Tensor, loss: FrequencyLoss, passed: Pass, others: Mapping[str, Tensor]) -> None:
        """Start the numbers of one batch on their way, ``others`` by name; nothing waits."""
        scalars = DeferredScalars(base_loss, loss.low, loss.high, loss.total, *others.values())
        self._pending.append(_Pending(scalars, tuple(others), passed.detached()))

    def settle(self, step: int) -> list[StepMetrics]:
        """The numbers that were added since the last call; to be called before the optimizer runs.

        Args:
            step: the number of the current step, counted from 1, for the message.

        Raises:
            NonFiniteLossError: one of them is NaN or infinite.
        """
        settled = []
        for pending in self._pending:
            base, low, high, total, *others = pending.scalars.read()
            numbers = StepMetrics(base, low, high, total, dict(zip(pending.names, others, strict=True)))
            if not all(abs(number) < float("inf") for number in numbers[1:4]):
                raise NonFiniteLossError(_describe_failure(pending, numbers, step))
            settled.append(numbers)
        self._pending.clear()
        return settled


def _describe_failure(pending: _Pending, numbers: StepMetrics, step: int) -> str:
    broken = not bool(pending.passed.prediction.isfinite().all())
    cause = (
        "the model's own prediction is not finite, so the run had diverged or overflowed without this term: "
        "lower the learning rate, use bf16 instead of fp16, or encode the latents with no_half_vae"
        if broken
        else "the term overflowed: lower dist_match, or narrow the window (freq_loss_max_timestep)"
    )
    return (
        f"the frequency loss is not finite in step {step}: low = {numbers.low}, high = {numbers.high}, "
        f"base loss = {numbers.base}, timesteps = {_as_text(pending.passed.timesteps)}, "
        f"prediction {_summary(pending.passed.prediction)}, target {_summary(pending.passed.target)}. "
        f"Likely cause: {cause}. The optimizer has not seen this step and nothing was saved with it; the last saved "
        "file is intact"
    )


def _as_text(timesteps: Tensor | float) -> str:
    return str(timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps)


def _summary(tensor: Tensor) -> str:
    finite = tensor[tensor.isfinite()].float()
    largest = f"max |x| = {finite.abs().max().item():.4g}" if finite.numel() else "no finite value"
    broken = tensor.numel() - finite.numel()
    return f"{tuple(tensor.shape)} {tensor.dtype} ({largest}, {broken} of {tensor.numel()} not finite)"
