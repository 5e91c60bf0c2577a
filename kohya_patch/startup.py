"""Checks the options before sd-scripts loads a model, where the package was installed with pip.

sd-scripts imports its network module only after it has loaded the models and cached the latents, which can take an
hour; a misspelt option should not wait for that. pip puts ``freq_loss_plugin_startup.pth`` beside the package (and
removes it with the package); Python reads that one line whenever it starts, and it calls `watch` only in a process
whose command line names one of sd-scripts' ``*train_network.py`` scripts. `watch` waits for the module
``library.train_util`` to be imported and wraps its ``verify_training_args``, the first thing that every trainer calls,
so that `kohya_patch.network.check` runs first, and only where the user chose ``network_module = "kohya_patch"``.

Without this (``pip install -e``, or the folder on PYTHONPATH) the same check runs when the network is created.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

_AWAITED_MODULE = "library.train_util"
_FIRST_CALL = "verify_training_args"


def watch() -> None:
    """Wait for sd-scripts; called by the .pth file in a process that runs one of its training scripts."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher:
    """A finder that finds one module the usual way and has it changed after it was executed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != _AWAITED_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = _then_check_early(loader.exec_module)
        return spec


def _then_check_early(execute: Any) -> Any:
    def exec_module(module: Any) -> None:
        execute(module)
        first_call = getattr(module, _FIRST_CALL, None)
        if first_call is not None:
            setattr(module, _FIRST_CALL, _check_before(first_call))

    return exec_module


def _check_before(first_call: Any) -> Any:
    @functools.wraps(first_call)
    def checked(args: Any, *rest: Any, **named: Any) -> Any:
        if getattr(args, "network_module", None) == __package__:
            from freq_loss_plugin import ConfigError

            from . import network
            from .trainers import UnsupportedTrainerError

            try:
                network.check_before_models_load()
            except (ConfigError, UnsupportedTrainerError) as error:
                sys.exit(f"\nfreq_loss: {error}\n")  # the message alone: a traceback would only hide it
        return first_call(args, *rest, **named)

    return checked
