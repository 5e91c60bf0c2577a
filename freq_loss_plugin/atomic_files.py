"""Atomic writes: a file is either complete or unchanged."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a temporary file beside ``file`` and move it there, so a full disk or a killed process leaves the old one.

    Args:
        file: the file to write; its folder is created if needed. Of several programs that write it, the last one wins.
        write: writes the content to the path it is given.

    Raises:
        OSError: it cannot be written; the message names the file and the cause.
    """
    target = Path(os.path.realpath(file))  # what a link leads to
    part = target.with_name(f".{secrets.token_hex(6)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.touch(exist_ok=False)
        # As the user wants new files, or has this one; safetensors creates some that only their owner can read.
        mode = (target if target.exists() else part).stat().st_mode
        write(part)
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        part.chmod(mode)
        part.replace(target)
    except Exception as error:  # safetensors, torch and matplotlib raise errors of their own for a full disk
        raise OSError(f"{file} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
