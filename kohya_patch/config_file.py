"""The options of a run, out of the host's arguments and of its TOML.

The hosts flatten their TOML into their arguments, by which a key of ``[freq_loss]`` that is spelled like nothing known
is lost among their own, and a network module that the command line replaces by ours is lost, too. So the file is looked
at once more.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import toml

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.options.keys import SECTION
from freq_loss_plugin.options.parsing import flatten, parse_pairs, parse_strings

from .wrapped_module import OWN_NAME

# Keys of other losses that work on wavelets, in forks of sd-scripts and in other trainers.
_FOREIGN_PREFIX = "wavelet_loss"


def read_config(args: argparse.Namespace) -> FreqLossConfig:
    """The options: the TOML's keys, over which ``network_args`` win.

    Raises:
        ConfigError: a key or a value cannot be used.
    """
    written = read(args)
    FreqLossConfig.check_section(section(written))
    own = [item for item in getattr(args, "network_args", None) or [] if FreqLossConfig.claims(item.partition("=")[0])]
    config = FreqLossConfig.from_mapping({**vars(args), **parse_strings(FreqLossConfig, parse_pairs(own))})
    module = network_module(written)
    if config.network_module is None and module not in (None, OWN_NAME):
        return replace(config, network_module=module)
    return config


def read(args: argparse.Namespace) -> Mapping[str, Any]:
    """The content of the file that ``config_file`` names; empty where there is none."""
    path = _path(args)
    return toml.loads(path.read_text(encoding="utf-8-sig")) if path is not None and path.is_file() else {}


def section(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section ``[freq_loss]`` of `read`'s result."""
    found = values.get(SECTION, {})
    return found if isinstance(found, Mapping) else {}


def network_module(values: Mapping[str, Any]) -> str | None:
    """The network module in the file, which is the one to wrap where the command line names ours."""
    return flatten(values).get("network_module")


def foreign_keys(args: argparse.Namespace) -> list[str]:
    """A warning where keys of another wavelet loss are set."""
    found = sorted(key for key, value in vars(args).items() if key.startswith(_FOREIGN_PREFIX) and value)
    if not found:
        return []
    ours = sorted(FreqLossConfig.fields_by_key())[:3]
    return [
        f"{', '.join(found)}: no option of this plug-in, whose options are {', '.join(ours)}, ...; the trainer ignores "
        "what it does not know without a word. Remove it, unless your trainer is a fork that has such a loss"
    ]


def _path(args: argparse.Namespace) -> Path | None:
    """The hosts accept the name with and without ``.toml``, and leave it in their arguments without its last ending.

    So ``my.v1`` is read from ``my.v1.toml`` and becomes ``my``; what was written is still on the command line.
    """
    name = getattr(args, "config_file", None)
    if not name:
        return None
    written = [part for part in _written(sys.argv) if os.path.splitext(part)[0] == name]  # noqa: PTH122 - as sd-scripts
    name = written[-1] if written else name
    return Path(name if name.endswith(".toml") else f"{name}.toml")


def _written(arguments: list[str]) -> list[str]:
    parts = [part for argument in arguments for part in argument.split("=", 1)]
    return [value for option, value in pairwise(parts) if option == "--config_file"]
