"""Text files that people write: with or without a byte order mark, and with Windows paths in TOML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import toml

from .fields import ConfigError

_PATH_KEY = re.compile(r"(dir|path|file|config|json|weights|vae|checkpoint)$")
_CONTROL = re.compile(r"[\a\b\t\n\v\f\r]")
_FIX = "use forward slashes, \"D:/train/new\", or single quotes, 'D:\\train\\new'"


def read_text(file: Path) -> str:
    """The text of a UTF-8 file without the byte order mark that Windows' editors put before it.

    Raises:
        OSError: the file cannot be read.
        ConfigError: it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8 text; save it as UTF-8") from None


def load_toml(file: Path, name: str) -> dict[str, Any]:
    """The content of a TOML file.

    Args:
        file: the file.
        name: of the option that names it, for errors.

    Raises:
        ConfigError: it is not there, no TOML, or has a path whose backslashes became other characters.
    """
    if not file.is_file():
        raise ConfigError(f"{name} {file}: there is no such file")
    text = read_text(file)
    try:
        values = toml.loads(text)
    except (ValueError, IndexError, TypeError) as error:  # toml's own errors are ValueErrors; it has bugs, too
        line = _first_with_backslash(text)
        hint = f". Line {line} has a backslash in double quotes, which begins an escape: {_FIX}" if line else ""
        raise ConfigError(f"{name} {file} is not a TOML file: {error}{hint}") from None
    for key, value in _strings(values):
        if _CONTROL.search(value) and (_PATH_KEY.search(key) or re.match(r"[A-Za-z]:", value)):
            raise ConfigError(
                f"{name} {file}: {key} = {value!r}: its backslashes were read as escapes, such as a tab for \\t; {_FIX}"
            )
    return values


def _first_with_backslash(text: str) -> int:
    """The number of the first line with a backslash in double quotes; 0 where there is none."""
    for number, line in enumerate(text.splitlines(), start=1):
        if re.search(r'"[^"]*\\[^"]*', re.sub(r"'[^'\"]*'", "", line.split("#")[0])):
            return number
    return 0


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts below a value, each with the key that it belongs to."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _strings(each, str(name))
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each, key)
