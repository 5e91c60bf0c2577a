"""Local variables of the functions that are running: the hosts hand over neither their trainer nor its arguments.

This module is also imported when Python starts (`kohya_patch.startup`), so it imports nothing large.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any


def local_variables(frame: FrameType, *names: str) -> list[Any]:
    """The values of local variables of a running function, None for those that it does not have.

    Until Python 3.12, reading ``f_locals`` leaves a dictionary with *all* local variables in the frame, which keeps
    them alive until the function returns: the text encoder of a trainer too, whatever the trainer deletes. So that
    dictionary is emptied again; Python fills it anew whenever it is asked for.
    """
    variables = frame.f_locals
    values = [variables.get(name) for name in names]
    if isinstance(variables, dict) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # a copy: not of a class or module
        variables.clear()
    return values


def callers_named(name: str) -> Iterator[FrameType]:
    """The running functions of this name that the calling function was called from, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == name:
            yield frame
        frame = frame.f_back
