"""Random numbers that disturb nobody else's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream_name(seed: int | None, number: int) -> str:
    """The name of the random stream of batch ``number`` of a run with ``seed``."""
    return f"freq_loss:{seed}:{number}"


def named_generator(name: str) -> torch.Generator:
    """A generator on the CPU that depends on ``name`` only: the same numbers whatever the device."""
    return torch.Generator().manual_seed(random.Random(name).getrandbits(63))


@contextmanager
def separate_random_stream(name: str, device: torch.device) -> Iterator[None]:
    """Seed every generator that a pass may draw from after ``name``, and put them back as they were afterwards.

    The states live on the host, so this does not wait for the device.
    """
    devices = [] if device.type == "cpu" else [device]
    python_state = random.getstate()
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        random.seed(name)
        seed = random.getrandbits(63)
        torch.default_generator.manual_seed(seed)
        if devices:
            getattr(torch, device.type).manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
