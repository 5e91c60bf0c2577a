"""Lets the batches of a host say which images they hold.

They do not say it, but the object that makes them knows. It is given a subclass of its own class that adds the names;
the batch is otherwise untouched, random numbers included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from .protocols import IMAGES

# The names of the images in the batch that an object makes for an index, in their order; a function of a module.
NamesOf: TypeAlias = Callable[[Any, int], list[str]]

_classes: dict[tuple[type, NamesOf], type] = {}


def let_name_images(maker: Any, names_of: NamesOf) -> None:
    """Let the batches that ``maker[index]`` returns have an entry `IMAGES`; once is enough, twice changes nothing.

    Args:
        maker: a data set, or whatever makes batches.
        names_of: see `NamesOf`.
    """
    if type(maker) not in _classes.values():
        maker.__class__ = _naming_class(type(maker), names_of)


def _naming_class(cls: Any, names_of: NamesOf) -> type:
    """A subclass with one base, made once: objects can change to it, since they are laid out alike."""

    def get_item(maker: Any, index: int) -> Any:
        batch = cls.__getitem__(maker, index)
        batch[IMAGES] = names_of(maker, index)
        return batch

    def reduce(maker: Any) -> Any:
        """Data sets are sent to loader processes by pickle where these are not forked."""
        return _rebuild, (cls, names_of, maker.__dict__)

    if (cls, names_of) not in _classes:
        contents = {"__getitem__": get_item, "__reduce__": reduce, "__module__": cls.__module__}
        _classes[cls, names_of] = type(cls.__name__, (cls,), contents)
    return _classes[cls, names_of]


def _rebuild(cls: type, names_of: NamesOf, state: dict[str, Any]) -> Any:
    made: Any = object.__new__(_naming_class(cls, names_of))
    made.__dict__.update(state)
    return made
