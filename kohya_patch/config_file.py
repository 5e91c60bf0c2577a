"""The TOML of a run, looked at once more: sd-scripts flattens it into its arguments, and some of it is lost there."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import toml

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.options.keys import SECTION
from freq_loss_plugin.options.parsing import flatten

# Keys of other losses that work on wavelets, in forks of sd-scripts and in other trainers.
_FOREIGN_PREFIX = "wavelet_loss"


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
        f"{', '.join(found)}: no option of this plug-in, whose options are {', '.join(ours)}, ...; sd-scripts ignores "
        "what it does not know without a word. Remove it, unless your sd-scripts is a fork that has such a loss"
    ]


def _path(args: argparse.Namespace) -> Path | None:
    """sd-scripts accepts the name with and without ``.toml``, and leaves it in its arguments without its last ending.

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
