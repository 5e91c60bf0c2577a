"""How what people write becomes options: one level of sections, ``key=value`` strings, and typos."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import fields
from typing import Any

from .fields import ConfigError, expectation, key_of, type_name


def parse_pairs(items: Iterable[str]) -> dict[str, str]:
    """``["dist_match=0.01", "freq_loss_method=fft"]`` as a dictionary.

    Raises:
        ConfigError: an item without ``=``, or a key given twice.
    """
    values: dict[str, str] = {}
    for item in items:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ConfigError(f"{item!r}: expected key=value, for instance dist_match=0.003")
        if key in values:
            raise ConfigError(f"{key} is given twice: {values[key]!r} and {value!r}; keep one")
        values[key] = value
    return values


def parse(option: Any, value: str) -> Any:
    """Give a string from a command line the option's type.

    Raises:
        ConfigError: a string that is no value of that type.
    """
    convert: Any = {"float": _parse_float, "int": int, "bool": _parse_bool}.get(type_name(option), str)
    try:
        return convert(value)
    except (ValueError, KeyError):
        raise ConfigError(f"{key_of(option)} = {value!r}: expected {expectation(option)}") from None


def sections(values: Mapping[str, Any], known: Container[str] = ()) -> dict[str, Mapping[str, Any]]:
    """The sections of a TOML by name; those called like an option in ``known`` are that option's value."""
    return {key: value for key, value in values.items() if isinstance(value, Mapping) and key not in known}


def flatten(values: Mapping[str, Any], known: Container[str] = ()) -> dict[str, Any]:
    """One level of sections merged into the top level, as sd-scripts does; of two equal keys the first wins."""
    tables = sections(values, known)
    flat = {key: value for key, value in values.items() if key not in tables}
    for table in tables.values():
        flat = {**table, **flat}
    return flat


def _parse_float(value: str) -> float | bool:
    """A number; for options that are as good as a switch also true and false, which `check_options` judges."""
    return _parse_bool(value) if value.lower() in ("true", "false") else float(value)


def _parse_bool(value: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[value.lower()]


def parse_strings(options: type, values: Mapping[str, str]) -> dict[str, Any]:
    """Give the strings that belong to an option dataclass their type; other keys pass unchanged.

    Raises:
        ConfigError: a string that is no value of the option's type.
    """
    by_key = {key_of(each): each for each in fields(options)}
    return {key: parse(by_key[key], value) if key in by_key else value for key, value in values.items()}
