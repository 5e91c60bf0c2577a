"""Checks the options before a training program loads a model, where the package was installed with pip.

The programs import their network module only after they have loaded the models, and sd-scripts also has cached the
latents by then, which can take an hour; a misspelled option should not wait for that. pip puts
``freq_loss_plugin_startup.pth`` beside the package (and removes it with the package); Python reads that one line
whenever it starts, and it calls `watch` only in a process whose command line names one of the ``*train_network.py`` or
``*train_leco.py`` scripts. `watch` waits for the module of the program that defines the function in `FIRST_CALLS`, and
wraps it, so that ``check_before_models_load`` of the program's ``network`` runs first, and only where the user chose
``network_module = "kohya_patch"``. Whichever module imports the function afterward gets the wrapped one.

Without this (``pip install -e``, or the folder on PYTHONPATH) the same check runs when the network is created.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import FrameType
from typing import Any, NamedTuple

from .frames import local_variables
from .host import UnsupportedTrainerError


class FirstCall(NamedTuple):
    """What a program calls before it loads a model, in a function that has the training arguments as ``args``.

    Attributes:
        package: one of its modules defines the function.
        function: its name.
        program: the folder of `kohya_patch` that is for this program.
    """

    package: str
    function: str
    program: str


FIRST_CALLS = (
    # In library.train_util, since v0.11.0 library.args.
    FirstCall("library", "verify_training_args", "sd_scripts"),
    FirstCall("musubi_tuner", "load_user_config", "musubi"),
)


def watch() -> None:
    """Wait for a program; called by the .pth file in a process that runs one of its training scripts."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher:
    """A finder that finds the programs' modules the usual way and has one of them changed after it was executed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        call = next((call for call in FIRST_CALLS if fullname.startswith(f"{call.package}.")), None)
        if call is None:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = functools.partial(self._execute, call, loader.exec_module)
        return spec

    def _execute(self, call: FirstCall, execute: Any, module: Any) -> None:
        execute(module)
        function = getattr(module, call.function, None)
        if self in sys.meta_path and getattr(function, "__module__", None) == module.__name__:
            setattr(module, call.function, _check_before(function, call.program))
            sys.meta_path.remove(self)


def _check_before(function: Any, program: str) -> Any:
    @functools.wraps(function)
    def checked(*arguments: Any, **named: Any) -> Any:
        if _is_asked_for(sys._getframe(1)):
            # Not before: this module is imported when Python starts.
            from freq_loss_plugin import ConfigError  # noqa: PLC0415

            try:
                importlib.import_module(f"{__package__}.{program}.network").check_before_models_load()
            except (ConfigError, UnsupportedTrainerError) as error:
                sys.exit(f"\nfreq_loss: {error}\n")  # the message alone: a traceback would only hide it
        return function(*arguments, **named)

    return checked


def _is_asked_for(caller: FrameType) -> bool:
    """Whether the arguments in the calling function name our network module."""
    (args,) = local_variables(caller, "args")
    return getattr(args, "network_module", None) == __package__
