"""What is generated from option fields: command-line arguments, what was given of them, and the tables in ``docs``."""

from __future__ import annotations

import argparse
from dataclasses import Field, fields
from typing import Any

from .fields import TABLE, expectation, key_of, type_name
from .parsing import parse


def add_to_parser(group: Any, options: type, without: tuple[str, ...] = ()) -> None:
    """Add ``--key`` for every field of an option dataclass that is not a section of its own.

    Arguments that are not given are absent from the namespace, so that they do not override a file.

    Args:
        group: an argparse parser or one of its groups.
        options: the dataclass.
        without: keys that are left out.
    """
    for key, option in _by_key(options).items():
        if key in without or type_name(option) == TABLE:
            continue
        is_flag = type_name(option) == "bool"
        group.add_argument(
            f"--{key}",
            default=argparse.SUPPRESS,
            metavar=_metavar(option),
            help=_help(option).replace("%", "%%"),
            **({"nargs": "?", "const": "true"} if is_flag else {}),
        )


def given(namespace: argparse.Namespace, *options: type) -> dict[str, Any]:
    """The keys that the command line gave, with values of the options' types.

    Args:
        namespace: what a parser with the arguments of `add_to_parser` read.
        options: the dataclasses; of two fields with the same key the first counts.

    Raises:
        ConfigError: a string that is no value of the option's type.
    """
    words = vars(namespace)
    return {key: parse(option, words[key]) for key, option in _by_key(*options).items() if key in words}


def markdown_table(options: type) -> str:
    """A table of the keys, defaults, allowed values and meanings of an option dataclass."""
    rows = ["| Key | Default | Values | Meaning |", "|---|---|---|---|"]
    for key, option in _by_key(options).items():
        meaning = option.metadata["meaning"].replace("|", "\\|")
        rows.append(f"| `{key}` | {_default(option)} | {_values(option)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _by_key(*options: type) -> dict[str, Field[Any]]:
    found: dict[str, Field[Any]] = {}
    for each in options:
        for option in fields(each):
            found.setdefault(key_of(option), option)
    return found


def _metavar(option: Field[Any]) -> str:
    choices = option.metadata["choices"]
    return "{" + ",".join(_written(choice) for choice in choices) + "}" if choices else type_name(option).upper()


def _help(option: Field[Any]) -> str:
    default = "" if option.default in (None, "") else f" (default: {_written(option.default)})"
    return option.metadata["meaning"] + default


def _default(option: Field[Any]) -> str:
    return "–" if option.default in (None, "") else f"`{_toml(option.default)}`"


def _values(option: Field[Any]) -> str:
    choices = option.metadata["choices"]
    return ", ".join(f"`{_toml(choice)}`" for choice in choices) if choices else expectation(option)


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else _written(value)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
