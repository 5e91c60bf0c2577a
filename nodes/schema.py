"""Schemas that every core accepts: keywords that newer versions brought are left out where unknown (see `core`)."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import core

CATEGORY = "FreqLoss"


def schema(**options: Any) -> io.Schema:
    """Make an `io.Schema` in our category."""
    return core.call(io.Schema, category=CATEGORY, **options)


def widget(kind: Any, name: str, **options: Any) -> io.Input:
    """Make an input, for instance ``widget(io.Float, "gain", default=1.0, tooltip=...)``."""
    return core.call(kind.Input, id=name, **options)
