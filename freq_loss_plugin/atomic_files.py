"""Atomic writes: a file is either complete or unchanged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a temporary file beside ``file`` and move it there, so a full disk or a killed process leaves the old one.

    Args:
        file: the file to write; its folder is created if needed.
        write: writes the content to the path it is given.

    Raises:
        OSError: it cannot be written; the message names the file and the cause.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    try:
        try:
            write(part)
        except Exception as error:  # safetensors, torch and matplotlib raise errors of their own for a full disk
            raise OSError(f"{file} cannot be written: {error}") from error
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        part.chmod(0o666 & ~_umask())  # safetensors creates files that only their owner can read
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
