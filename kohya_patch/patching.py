"""Replaces methods of one object; its class and the files that define it stay as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class PatchedMethods:
    """Methods of one object that are replaced until `restore`.

    Args:
        target: the object.
    """

    def __init__(self, target: Any) -> None:
        self._target = target
        self._originals: dict[str, Callable[..., Any]] = {}
        self._signatures: dict[str, inspect.Signature] = {}

    def replace(self, name: str, replacement: Callable[..., Any]) -> None:
        """Let the object's method ``name`` be ``replacement``."""
        self._originals[name] = getattr(self._target, name)
        self._signatures[name] = inspect.signature(self._originals[name])
        setattr(self._target, name, replacement)

    def original(self, name: str) -> Callable[..., Any]:
        """The method that was replaced."""
        return self._originals[name]

    def bind(self, name: str, *arguments: Any, **named: Any) -> inspect.BoundArguments:
        """The arguments of a call of the method that was replaced, by parameter, defaults included."""
        bound = self._signatures[name].bind(*arguments, **named)
        bound.apply_defaults()
        return bound

    def restore(self) -> None:
        """Give the object its own methods back."""
        for name, original in self._originals.items():
            delattr(self._target, name)
            if getattr(self._target, name) != original:  # it had one of its own, not its class
                setattr(self._target, name, original)
        self._originals.clear()
