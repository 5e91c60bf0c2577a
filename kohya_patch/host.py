"""How a training program is checked before it is changed: its methods, their parameters, and who calls what.

What is assumed of each is in ``host`` of its folder, and the checks use its own classes. A function is looked up where
its caller looks it up: replacing it in a module that only re-exports it would have no effect.

This module is also imported when Python starts (`kohya_patch.startup`), so it imports nothing large.
"""

from __future__ import annotations

import dis
import inspect
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict


class UnsupportedTrainerError(RuntimeError):
    """This program, or this trainer, lacks what the hook needs; says what was looked for and what was found."""


class Report(TypedDict):
    """What a program's ``host_check`` found.

    Attributes:
        problems: for each training script what is wrong with it, or None.
        checks_early: whether a wrong option is found before a model is loaded.
    """

    problems: dict[str, str | None]
    checks_early: bool


@dataclass(frozen=True)
class Host:
    """A training program, as messages speak of it.

    Attributes:
        name: the program.
        tested: the versions that work, as a sentence without its period.
        network_modules: some of its own, by which it trains without the plug-in; the most usual one first.
        depth: how many folders the file of ``train`` lies below the program's own.
    """

    name: str
    tested: str
    network_modules: tuple[str, ...]
    depth: int = 0

    @property
    def plain_module(self) -> str:
        """The most usual network module."""
        return self.network_modules[0]

    def check_methods(self, trainer: type, needed: Mapping[str, tuple[str, ...]]) -> None:
        """Check that a trainer class has the methods in ``needed``, with the parameters named there.

        Raises:
            UnsupportedTrainerError: names the method or parameter that is missing.
        """
        for name, parameters in needed.items():
            method = getattr(trainer, name, None)
            if method is None:
                raise self.unsupported(trainer, f"the method {name} in {trainer.__name__}", "none of that name")
            found = inspect.signature(method).parameters
            self.check_names(trainer, f"parameters of {trainer.__name__}.{name}", parameters, list(found))

    def check_names(self, trainer: type, kind: str, needed: Iterable[str], found: Iterable[str]) -> None:
        """Check that all names of a kind are there.

        Raises:
            UnsupportedTrainerError: names those that are missing.
        """
        found = list(dict.fromkeys(found))
        missing = [name for name in needed if name not in found]
        if missing:
            raise self.unsupported(trainer, f"{', '.join(missing)} among the {kind}", ", ".join(found) or "none")

    def unsupported(self, trainer: type, looked_for: str, found: str) -> UnsupportedTrainerError:
        """The error for a version in which an assumption does not hold; names it and those that work.

        Args:
            trainer: the trainer class.
            looked_for: what is assumed.
            found: what is there instead.
        """
        train = getattr(trainer, "train", trainer)
        folder = Path(inspect.getsourcefile(inspect.unwrap(train)) or "x").resolve().parents[self.depth]
        return UnsupportedTrainerError(
            f"{self.name} {version(folder)} in {folder} cannot be used with kohya_patch: looked for "
            f"{looked_for}, and found {found}. {self.tested}. Update {self.name} where it is older (git pull) or "
            "freq_loss_plugin where it is newer, or train without the frequency loss by setting network_module back "
            f'to "{self.plain_module}"'
        )


class CalledFunction(NamedTuple):
    """A function at the place where its caller looks it up.

    Attributes:
        namespace: the variables of a module: the caller's own, or of one that the caller names.
        name: of the function.
    """

    namespace: dict[str, Any]
    name: str

    @property
    def function(self) -> Callable[..., Any]:
        """The function that is there now."""
        function: Callable[..., Any] = self.namespace[self.name]
        return function

    @contextmanager
    def replaced_by(self, function: Callable[..., Any]) -> Iterator[None]:
        """Let the caller find ``function`` for as long as this lasts."""
        original = self.function
        self.namespace[self.name] = function
        try:
            yield
        finally:
            self.namespace[self.name] = original


def find_call(trainer: type, method: str, *names: str) -> CalledFunction | None:
    """The last function of a chain of calls that begins in a method of the trainer class.

    Args:
        trainer: a trainer class.
        method: the name of one of its methods, its own or inherited.
        names: functions, each called by the one before, the first by the method.

    Returns:
        Where the last of them is looked up, or None where one of the calls is not made.
    """
    callers: list[Any] = [vars(cls)[method] for cls in trainer.__mro__ if method in vars(cls)]
    found = None
    for name in names:
        found = next(filter(None, (lookup(caller, name) for caller in callers)), None)
        if found is None:
            return None
        callers = [found.function]
    return found


def lookup(caller: Any, name: str) -> CalledFunction | None:
    """Where the code of ``caller`` reads ``name``: its own module's variables, or those of a module that it names."""
    caller = inspect.unwrap(caller)
    path: list[str] = []
    for instruction in dis.get_instructions(caller):
        if instruction.opname == "EXTENDED_ARG":
            continue
        if instruction.opname == "LOAD_GLOBAL":
            path = [instruction.argval]
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and path:
            path.append(instruction.argval)
        else:
            path = []
        if path and path[-1] == name:
            namespace = caller.__globals__
            for module in path[:-1]:
                namespace = getattr(namespace.get(module), "__dict__", {})
            return CalledFunction(namespace, name) if name in namespace else None
    return None


def version(folder: Path) -> str:
    """Tag, commit and date of the checkout in ``folder``; "of an unknown version" without git."""
    unknown = "of an unknown version"
    if not (folder / ".git").exists():  # git would answer for a folder above it
        return unknown
    commands = ("describe --tags --always --long", "log -1 --format=%cs")
    options: dict[str, Any] = {"cwd": folder, "capture_output": True, "text": True, "check": True}
    try:
        printed = [subprocess.run(["git", *command.split()], **options).stdout.strip() for command in commands]
    except (OSError, subprocess.CalledProcessError):
        return unknown
    return " of ".join(printed)
