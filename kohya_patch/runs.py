"""The run in progress, found on the call stack, and the process that it runs in."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

from .frames import callers_named, local_variables
from .protocols import Family, Trainer

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing since Python 3.11


FamilyT = TypeVar("FamilyT", bound=Family)


@dataclass(frozen=True)
class TrainingRun(Generic[FamilyT]):
    """A run in progress: the trainer, the arguments it was started with, and its data sets.

    Attributes:
        families: what the trainers of the program train, by the names of their classes: a script that is executed
            defines its own in ``__main__``.
        groups: the variables of ``train`` with the data sets for training and, where there are any, for validation.
    """

    families: ClassVar[Mapping[str, Any]]
    groups: ClassVar[tuple[str, ...]]

    trainer: Trainer
    args: argparse.Namespace
    datasets: tuple[Any, ...] = ()
    validation_datasets: tuple[Any, ...] = ()

    @property
    def family(self) -> FamilyT:
        """The family that is nearest to the trainer's class."""
        return next(self.families[cls.__name__] for cls in type(self.trainer).__mro__ if cls.__name__ in self.families)

    @property
    def batch_sizes(self) -> list[int]:
        """Of the data sets for training, as far as they say it."""
        return [dataset.batch_size for dataset in self.datasets if hasattr(dataset, "batch_size")]

    @classmethod
    def find(cls) -> Self | None:
        """The run that calls this function, or None.

        A host hands a network module neither its trainer nor its arguments, but it calls it from
        ``trainer.train(args)``, and the innermost such call is on the stack.
        """
        for frame in callers_named("train"):
            trainer, args, *groups = local_variables(frame, "self", "args", *cls.groups)
            is_trainer = any(each.__name__ in cls.families for each in type(trainer).__mro__)
            if is_trainer and isinstance(args, argparse.Namespace):
                datasets = (tuple(getattr(group, "datasets", ())) for group in groups)
                return cls(cast(Trainer, trainer), args, *datasets)
        return None


def is_main_process() -> bool:
    """Whether this is the process that logs and saves."""
    from accelerate import PartialState  # noqa: PLC0415 - install.py reads this module without accelerate

    return PartialState().is_main_process


def process_index() -> int:
    """The number of this process."""
    from accelerate import PartialState  # noqa: PLC0415

    return PartialState().process_index
