"""The one place where the optional package ``pytorch_wavelets`` is imported.

pytorch_wavelets 1.3.0 runs ``from pkg_resources import resource_stream`` while it is imported. The name is only used to
read the dual-tree coefficients, which this project never asks for, but without it the whole package fails to import,
and it often is missing: setuptools 81 and newer no longer ship ``pkg_resources``, older ones raise AttributeError on
Python 3.12 and newer, and other ComfyUI packs leave an empty module of that name behind. `load` therefore puts a
working ``resource_stream`` in its place for the length of that one import, and puts back whatever was there.
"""

from __future__ import annotations

import importlib
import importlib.resources
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, Any

# PyWavelets by name, because pytorch_wavelets 1.3.0 needs it and does not declare it.
INSTALL_HINT = "pip install pytorch_wavelets PyWavelets"

_import_lock = threading.Lock()


def load() -> types.ModuleType:
    """Import and return ``pytorch_wavelets``.

    Raises:
        ImportError: the package, or something that it needs, is not installed.
    """
    if "pytorch_wavelets" in sys.modules:
        return importlib.import_module("pytorch_wavelets")  # waits where another thread is still importing it
    with _import_lock, _pkg_resources_stand_in():
        return importlib.import_module("pytorch_wavelets")


@cache
def discrete_wavelets() -> tuple[str, ...]:
    """Names of all discrete wavelets that PyWavelets knows (``db3``, ``haar``, ``sym5``, ...)."""
    load()
    import pywt  # noqa: PLC0415 - as pytorch_wavelets, which needs it

    return tuple(pywt.wavelist(kind="discrete"))


@contextmanager
def _pkg_resources_stand_in() -> Iterator[None]:
    def resource_stream(package: str, name: str) -> IO[bytes]:
        return importlib.resources.files(package).joinpath(name).open("rb")

    stand_in: Any = types.ModuleType("pkg_resources")
    stand_in.resource_stream = resource_stream
    missing = object()
    before: Any = sys.modules.get("pkg_resources", missing)
    sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        if before is missing:
            del sys.modules["pkg_resources"]
        else:
            sys.modules["pkg_resources"] = before
