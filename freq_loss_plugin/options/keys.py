"""The keys of a TOML that belong to the plug-in: in its section, beside the trainer's, and misspelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .fields import ConfigError, nearest
from .parsing import flatten, sections

# The section of the TOML that holds the options, and the beginning of nearly every key.
SECTION = "freq_loss"
PREFIX = "freq_loss_"

# How alike a foreign key must be to one of ours before it counts as a typo.
_TYPO_CUTOFF = 0.84


def claims(key: str, own: Sequence[str]) -> bool:
    """Whether ``key`` is, or by its looks was meant to be, one of the keys ``own`` and not one of the trainer."""
    return key in own or key.startswith(PREFIX) or nearest(key, own, _TYPO_CUTOFF) is not None


def flat_options(values: Mapping[str, Any], known: Sequence[str], own: Sequence[str]) -> dict[str, Any]:
    """The keys of a TOML with its sections merged into the top level.

    Args:
        values: keys and values, flat or in sections.
        known: the keys of options.
        own: those of them that only the plug-in has.

    Raises:
        ConfigError: a key that is meant to be an option and is none, or one that is given twice.
    """
    section = values.get(SECTION, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"{SECTION} = {section!r}: expected a section; write [{SECTION}] on a line of its own")
    check_section(section, known, own)
    flat = flatten(values, known)
    for name, table in sections(values, known).items():
        for key, value in table.items():
            if flat[key] != value and key in known:
                raise ConfigError(f"{key} is given twice: {flat[key]!r} and, in [{name}], {value!r}; keep one")
    for key in flat:
        if key not in known and claims(key, own):
            raise _unknown_key(key, own)
    return flat


def check_section(section: Mapping[str, Any], known: Sequence[str], own: Sequence[str]) -> None:
    """Raise ConfigError for the first key of a ``[freq_loss]`` section that is not an option."""
    for key in section:
        if key not in known:
            raise _unknown_key(key, own, f"in [{SECTION}]")


def _unknown_key(key: str, own: Sequence[str], where: str = "") -> ConfigError:
    without_prefix = {candidate.removeprefix(PREFIX): candidate for candidate in own}
    meant = nearest(key, own) or without_prefix.get(nearest(key, list(without_prefix)) or "")
    suggestion = f" Did you mean {meant}?" if meant else ""
    return ConfigError(f"{key}: unknown option {where}".rstrip() + f".{suggestion} Options: {', '.join(own)}")
