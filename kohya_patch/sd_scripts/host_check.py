"""Checks an sd-scripts by its own code, in its folder: `python -m kohya_patch.sd_scripts.host_check train_network.py`.

Used by ``install.py``. Imports every ``*train_network.py`` (no model is loaded), checks what `host` assumes
of its trainer, and prints one line of JSON, see `Report`. The argument makes this process look like a training run to
the .pth file of an installed plug-in.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from ..host import Report, UnsupportedTrainerError
from . import host
from .trainers import FAMILIES


def main() -> None:
    """Check the sd-scripts in the current folder and print a `Report`."""
    scripts = sorted(path.stem for path in Path().glob("*train_network.py"))
    problems = {f"{script}.py": check_script(script) for script in scripts}
    checks_early = problems.get("train_network.py") is None and check_is_early()
    print(json.dumps(Report(problems=problems, checks_early=checks_early)))


def check_script(script: str) -> str | None:
    """What is wrong with a training script: it cannot be imported, or an assumption about its trainer does not hold.

    Args:
        script: its name without the ending.
    """
    try:
        module = importlib.import_module(script)
    except Exception as error:  # noqa: BLE001 - whatever a foreign module raises
        return f"cannot be imported by this Python: {type(error).__name__}: {error}"
    own = [cls for cls in vars(module).values() if getattr(cls, "__module__", None) == script]
    trainer = next((cls for cls in own if isinstance(cls, type) and cls.__name__ in FAMILIES), None)
    if trainer is None:
        return f"has no trainer that this plug-in knows; it knows {', '.join(FAMILIES)}"
    family = FAMILIES[trainer.__name__]
    try:
        host.check_everything(trainer, family.kind, guidance=family.guidance)
    except UnsupportedTrainerError as error:
        return str(error)
    return None


def check_is_early() -> bool:
    """Whether a run with a misspelled option is stopped by the plug-in's own message before anything else happens.

    It is given no other option, so that sd-scripts itself cannot get further than to the first one that it looks for.
    """
    trainer = importlib.import_module("train_network").NetworkTrainer()
    try:
        trainer.train(argparse.Namespace(network_module="kohya_patch", network_args=["freq_loss_metod=fft"]))
    except SystemExit as stopped:
        return "freq_loss: " in str(stopped.code)
    except Exception:  # noqa: BLE001 - sd-scripts looked for an option of its own
        return False
    return False


if __name__ == "__main__":
    sys.argv = sys.argv[:1]
    main()
