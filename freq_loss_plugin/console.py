"""Consoles that cannot show every character."""

from __future__ import annotations

import io
import sys


def print_any_text() -> None:
    r"""Let standard output write what its encoding lacks as ``\u732b``, as standard error does, instead of failing.

    Pipes on Windows have encodings like cp1252, and a file name may hold bytes that are no text at all.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
