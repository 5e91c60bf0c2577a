"""Checks the options before sd-scripts loads a model, where the package was installed with pip.

sd-scripts imports its network module only after it has loaded the models and cached the latents, which can take an
hour; a misspelled option should not wait for that. pip puts ``freq_loss_plugin_startup.pth`` beside the package (and
removes it with the package); Python reads that one line whenever it starts, and it calls `watch` only in a process
whose command line names one of sd-scripts' ``*train_network.py`` or ``*train_leco.py`` scripts. `watch` waits for the
module of sd-scripts that defines ``verify_training_args``, the first thing that every trainer calls, and wraps it, so
that `kohya_patch.network.check_before_models_load` runs first, and only where the user chose
``network_module = "kohya_patch"``. That module is ``library.train_util``, since v0.11.0 ``library.args``; whichever
module imports the function afterward gets the wrapped one.

Without this (``pip install -e``, or the folder on PYTHONPATH) the same check runs when the network is created.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from .host import FIRST_CALL, LIBRARY, UnsupportedTrainerError


def watch() -> None:
    """Wait for sd-scripts; called by the .pth file in a process that runs one of its training scripts."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher:
    """A finder that finds sd-scripts' modules the usual way and has one of them changed after it was executed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if not fullname.startswith(f"{LIBRARY}."):
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = functools.partial(self._execute, loader.exec_module)
        return spec

    def _execute(self, execute: Any, module: Any) -> None:
        execute(module)
        first_call = getattr(module, FIRST_CALL, None)
        if self in sys.meta_path and getattr(first_call, "__module__", None) == module.__name__:
            setattr(module, FIRST_CALL, _check_before(first_call))
            sys.meta_path.remove(self)


def _check_before(first_call: Any) -> Any:
    @functools.wraps(first_call)
    def checked(args: Any, *rest: Any, **named: Any) -> Any:
        if getattr(args, "network_module", None) == __package__:
            # Not before: this module is imported when Python starts.
            from freq_loss_plugin import ConfigError  # noqa: PLC0415

            from . import network  # noqa: PLC0415

            try:
                network.check_before_models_load()
            except (ConfigError, UnsupportedTrainerError) as error:
                sys.exit(f"\nfreq_loss: {error}\n")  # the message alone: a traceback would only hide it
        return first_call(args, *rest, **named)

    return checked
