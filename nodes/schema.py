"""Schemas that every supported ComfyUI accepts: keywords of newer versions are dropped where unknown (see `core`)."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import core

CATEGORY = "FreqLoss"


def schema(**options: Any) -> io.Schema:
    """Make an `io.Schema` in this pack's category."""
    return core.call_supported(io.Schema, category=CATEGORY, **options)


def widget(io_type: Any, name: str, **options: Any) -> io.Input:
    """Make an input, for instance ``widget(io.Float, "gain", default=1.0, tooltip=...)``."""
    return core.call_supported(io_type.Input, id=name, **options)
