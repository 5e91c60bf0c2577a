"""Options as fields of a dataclass: keys, types, choices, and errors in the words of the person who wrote them.

`freq_loss_plugin.options.config` and the engine's settings are such dataclasses; both check their values here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from typing import Any

# The type of options that are sections of their own.
TABLE = "ImageRules"


class ConfigError(ValueError):
    """An option that cannot be used as given; the message names the key, the value, what is allowed and the fix."""


def option(
    default: Any, meaning: str, *, key: str | None = None, prefix: str = "", choices: tuple[Any, ...] | None = None
) -> Any:
    """A field of an options dataclass.

    Args:
        default: its value where nothing is given. None allows None and means "not given".
        meaning: one line of help.
        key: how it is written in a TOML; ``prefix`` and the field's name where left out.
        prefix: see ``key``.
        choices: the only values allowed.
    """
    return field(default=default, metadata={"meaning": meaning, "key": key, "prefix": prefix, "choices": choices})


def key_of(option: Any) -> str:
    """How the option is written in a TOML."""
    return option.metadata["key"] or option.metadata["prefix"] + option.name


def check_options(values: Any) -> None:
    """Raise ConfigError for the first field of the dataclass ``values`` that is of the wrong type or no choice."""
    for each in fields(values):
        _check(each, getattr(values, each.name))


def wrong_value(values: Any, name: str, expected: str) -> ConfigError:
    """The error for field ``name`` of the dataclass ``values``: received, expected."""
    each = next(each for each in fields(values) if each.name == name)
    return ConfigError(f"{key_of(each)} = {getattr(values, name)!r}: expected {expected}")


def nearest(word: str, candidates: Sequence[str], cutoff: float = 0.5) -> str | None:
    """The candidate that ``word`` was probably meant to be."""
    return next(iter(difflib.get_close_matches(word, candidates, n=1, cutoff=cutoff)), None)


def type_name(option: Any) -> str:
    """The type that a field is annotated with, without None."""
    return str(option.type).removesuffix(" | None")


def _check(option: Any, value: Any) -> None:
    if option.default is None and value is None:
        return
    accepted: Any = {"float": (int, float), "int": int, "bool": bool, TABLE: Mapping}.get(type_name(option), str)
    is_flag = isinstance(value, bool)
    if not isinstance(value, accepted) or (is_flag and type_name(option) != "bool"):
        raise ConfigError(
            f"{key_of(option)} = {value!r} ({type(value).__name__}): expected {expectation(option)}"
            f"{_type_hint(option, value)}"
        )
    choices = option.metadata["choices"]
    if choices and value not in choices:
        meant = nearest(str(value).lower(), [str(choice) for choice in choices], cutoff=0.4)
        suggestion = f"; did you mean {meant!r}?" if meant else ""
        raise ConfigError(f"{key_of(option)} = {value!r}: expected {expectation(option)}{suggestion}")


def _type_hint(option: Any, value: Any) -> str:
    if isinstance(value, str) and type_name(option) in ("float", "int", "bool"):
        return "; remove the quotes"
    if isinstance(value, float) and type_name(option) == "int" and math.isfinite(value):
        return f"; write {round(value)}"
    return ""


def expectation(option: Any) -> str:
    """What a field accepts, in words."""
    if option.metadata["choices"]:
        return "one of " + ", ".join(map(repr, option.metadata["choices"]))
    kinds = {"float": "a number", "int": "a whole number", "bool": "true or false"}
    if type_name(option) == TABLE:
        return f"a section [freq_loss.{key_of(option)}]"
    return kinds.get(type_name(option), "a quoted string")
