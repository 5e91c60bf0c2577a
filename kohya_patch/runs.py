"""The run in progress, found on the call stack, and the process that it runs in."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

from .protocols import Family, Trainer


@dataclass(frozen=True)
class TrainingRun:
    """A run in progress: the trainer, the arguments it was started with, and its data sets."""

    trainer: Trainer
    args: argparse.Namespace
    batch_sizes: tuple[int, ...] = ()
    datasets: tuple[Any, ...] = ()
    validation_datasets: tuple[Any, ...] = ()

    @property
    def family(self) -> Family:
        """What the trainer trains."""
        raise NotImplementedError


class TrainCall(NamedTuple):
    """A call of ``trainer.train(args)`` that is being executed, and its variables."""

    trainer: Trainer
    args: argparse.Namespace
    variables: Mapping[str, Any]


def find_train_call(trainer_classes: Collection[str]) -> TrainCall | None:
    """The innermost call of ``train`` of a trainer that is of one of these classes or derived from one; or None.

    A host hands a network module neither its trainer nor its arguments, but that call is on the stack.

    Args:
        trainer_classes: names of classes, since a script that is executed defines its own in ``__main__``.
    """
    for frame in _callers():
        if frame.f_code.co_name != "train":
            continue
        trainer, args = frame.f_locals.get("self"), frame.f_locals.get("args")
        is_trainer = any(cls.__name__ in trainer_classes for cls in type(trainer).__mro__)
        if is_trainer and isinstance(args, argparse.Namespace):
            return TrainCall(trainer, args, frame.f_locals)  # type: ignore[arg-type]
    return None


def is_main_process() -> bool:
    """Whether this is the process that logs and saves."""
    from accelerate import PartialState  # noqa: PLC0415 - install.py reads this module without accelerate

    return PartialState().is_main_process


def process_index() -> int:
    """The number of this process."""
    from accelerate import PartialState  # noqa: PLC0415

    return PartialState().process_index


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
