"""What a trainer needs around the loss in one step, the same in sd-scripts and in the engine of this project.

The timestep of the unified pass (`unified_timestep`), those of a batch that may share one (`shared_timesteps`), random
numbers that disturb nobody else's (`separate_random_stream`), and the numbers of the term, read without waiting for the
device and checked before the optimizer runs (`TermMonitor`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import FreqLossConfig
from .loss import FrequencyLoss


class NonFiniteLossError(RuntimeError):
    """The frequency term became NaN or infinite; raised before the optimizer sees it."""


def stream_name(seed: int | None, number: int) -> str:
    """The name of the random stream of the extra pass ``number`` of a training with ``seed``."""
    return f"freq_loss:{seed}:{number}"


def unified_timestep(config: FreqLossConfig, seed: int | None, number: int) -> int:
    """The one timestep of the extra pass ``number``: uniform over min_timestep <= t < max_timestep.

    It depends on the seed and the number of the pass only, so that all processes agree on it and a resumed training
    continues the sequence.
    """
    return random.Random(stream_name(seed, number)).randrange(config.min_timestep, config.max_timestep)


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
        name: of the random stream; every process of a training that passes the same one takes the same decision.
        process: number of this process; outside the window each draws for itself.

    Returns:
        Timesteps of shape (count,), and the shared one or None.
    """
    host = torch.device("cpu")

    def inside(timesteps: Tensor) -> Tensor:
        return (timesteps >= config.min_timestep) & (timesteps < config.max_timestep)

    with separate_random_stream(name, host):
        first = draw(1)
    if inside(first).item():
        return first.expand(count), first.item()
    outside: list[Tensor] = []
    with separate_random_stream(f"{name}:{process}", host):
        while sum(map(len, outside)) < count:
            drawn = draw(max(count, 8))
            outside.append(drawn[~inside(drawn)])
    return torch.cat(outside)[:count], None


@contextmanager
def separate_random_stream(name: str, device: torch.device) -> Iterator[None]:
    """Seed every generator that a pass may draw from after ``name``, and put them back as they were afterwards.

    The states live on the host, so this does not wait for the device.
    """
    module = None if device.type == "cpu" else getattr(torch, device.type)
    python_state, host_state = random.getstate(), torch.get_rng_state()
    device_state = module.get_rng_state() if module else None
    random.seed(name)
    seed = random.getrandbits(63)
    torch.default_generator.manual_seed(seed)
    if module:
        module.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(host_state)
        if module:
            module.set_rng_state(device_state)


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
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> list[float]:
        """The values as Python numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


class TermNumbers(NamedTuple):
    """The numbers of one batch, on the host: the base loss, L_low, L_high, the weighted term, and others by name."""

    base: float
    low: float
    high: float
    total: float
    others: Mapping[str, float] = MappingProxyType({})

    @property
    def share(self) -> float:
        """The term's part of the whole loss, 0 to 1."""
        return self.total / (self.base + self.total) if self.base + self.total else 0.0

    def logs(self) -> dict[str, float]:
        """As TensorBoard and W&B show them."""
        return {
            "loss/freq_low": self.low,
            "loss/freq_high": self.high,
            "loss/freq_total": self.total,
            "loss/freq_share": self.share,
            **{f"loss/freq_{name}": value for name, value in self.others.items()},
        }

    @classmethod
    def mean(cls, batches: Sequence[TermNumbers]) -> TermNumbers:
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
    prediction: Tensor
    target: Tensor
    timesteps: Tensor | float


class TermMonitor:
    """Keeps the terms of a step until their numbers have arrived, and stops a training that they show to be broken."""

    def __init__(self) -> None:
        self._pending: list[_Pending] = []

    def add(
        self,
        base_loss: Tensor,
        term: FrequencyLoss,
        prediction: Tensor,
        target: Tensor,
        timesteps: Tensor | float,
        others: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Start the numbers of one batch on their way, ``others`` by name; nothing waits."""
        others = others or {}
        scalars = DeferredScalars(base_loss, term.low, term.high, term.total, *others.values())
        self._pending.append(_Pending(scalars, tuple(others), prediction.detach(), target.detach(), timesteps))

    def settle(self, step: int) -> list[TermNumbers]:
        """The numbers that were added since the last call; to be called before the optimizer runs.

        Args:
            step: the number of the step under way, counted from 1, for the message.

        Raises:
            NonFiniteLossError: one of them is NaN or infinite.
        """
        settled = []
        for pending in self._pending:
            base, low, high, total, *others = pending.scalars.read()
            numbers = TermNumbers(base, low, high, total, dict(zip(pending.names, others, strict=True)))
            if not all(abs(number) < float("inf") for number in numbers[1:4]):
                raise NonFiniteLossError(_describe_failure(pending, numbers, step))
            settled.append(numbers)
        self._pending.clear()
        return settled


def _describe_failure(pending: _Pending, numbers: TermNumbers, step: int) -> str:
    broken = not bool(pending.prediction.isfinite().all())
    cause = (
        "the model's own prediction is not finite, so the training had diverged or overflowed without this term: "
        "lower the learning rate, use bf16 instead of fp16, or train the VAE's latents with no_half_vae"
        if broken
        else "the term overflowed: lower dist_match, or narrow the window (freq_loss_max_timestep)"
    )
    return (
        f"the frequency loss is not finite in step {step}: low = {numbers.low}, high = {numbers.high}, "
        f"base loss = {numbers.base}, timesteps = {_shorten(pending.timesteps)}, "
        f"prediction {_summary(pending.prediction)}, target {_summary(pending.target)}. Likely cause: {cause}. "
        "The optimizer has not seen this step and nothing was saved with it; the last saved file is intact"
    )


def _shorten(timesteps: Tensor | float) -> str:
    return str(timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps)


def _summary(tensor: Tensor) -> str:
    finite = tensor[tensor.isfinite()].float()
    largest = f"max |x| = {finite.abs().max().item():.4g}" if finite.numel() else "no finite value"
    broken = tensor.numel() - finite.numel()
    return f"{tuple(tensor.shape)} {tensor.dtype} ({largest}, {broken} of {tensor.numel()} not finite)"
