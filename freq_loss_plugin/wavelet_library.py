"""The one place where the optional package ``pytorch_wavelets`` is imported.

pytorch_wavelets 1.3.0 runs ``from pkg_resources import resource_stream`` while it is imported, and setuptools 81 and
newer no longer ship ``pkg_resources``. The name is only used to read the dual-tree coefficients, which this project
never asks for, but without it the whole package fails to import. `load` therefore lends it a working
``resource_stream`` for the length of that one import and takes it back: the user's setuptools stays as it is, and other
packages still see whether ``pkg_resources`` exists.
"""

from __future__ import annotations

import importlib
import importlib.resources
import importlib.util
import sys
import threading
import types
import warnings
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
    with _import_lock:
        if _has_pkg_resources():
            with warnings.catch_warnings():
                # setuptools 67 to 80 announce the end of pkg_resources at every import of it.
                warnings.filterwarnings("ignore", message=".*pkg_resources.*")
                return importlib.import_module("pytorch_wavelets")
        sys.modules["pkg_resources"] = _pkg_resources_stand_in()
        try:
            return importlib.import_module("pytorch_wavelets")
        finally:
            del sys.modules["pkg_resources"]


@cache
def discrete_wavelets() -> tuple[str, ...]:
    """Names of all discrete wavelets that PyWavelets knows (``db3``, ``haar``, ``sym5``, ...)."""
    load()
    import pywt

    return tuple(pywt.wavelist(kind="discrete"))


def _has_pkg_resources() -> bool:
    if "pkg_resources" in sys.modules:
        return True
    return importlib.util.find_spec("pkg_resources") is not None


def _pkg_resources_stand_in() -> types.ModuleType:
    def resource_stream(package: str, name: str) -> IO[bytes]:
        return importlib.resources.files(package).joinpath(name).open("rb")

    module: Any = types.ModuleType("pkg_resources")
    module.resource_stream = resource_stream
    return module
