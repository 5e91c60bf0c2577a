"""Schemas that every core from 0.3.64 on accepts: keywords that newer cores brought are left out where unknown."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

CATEGORY = "FreqLoss"

# One unknown keyword makes a core drop the whole pack. These may be left out; any other is a mistake of ours.
_NEWER = {"search_aliases", "advanced", "essentials_category"}


def schema(**options: Any) -> io.Schema:
    """Make an `io.Schema` in our category."""
    return _known(io.Schema, {"category": CATEGORY, **options})


def widget(kind: Any, name: str, **options: Any) -> io.Input:
    """Make an input, for instance ``widget(io.Float, "gain", default=1.0, tooltip=...)``."""
    return _known(kind.Input, {"id": name, **options})


def _known(make: Callable[..., Any], options: dict[str, Any]) -> Any:
    known = inspect.signature(make).parameters
    return make(**{name: value for name, value in options.items() if name in known or name not in _NEWER})
