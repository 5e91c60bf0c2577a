"""Checks a musubi-tuner by its own code, in its folder: `python -m kohya_patch.musubi.host_check hv_train_network.py`.

Used by ``install.py``. Imports every ``*_train_network.py`` (no model is loaded), checks what `host` assumes of its
trainer, and prints one line of JSON, a `Report`. The argument makes this process look like a training run to the .pth
file of an installed plug-in.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

from ..host import Report, UnsupportedTrainerError
from . import host
from .host import MUSUBI, PACKAGE
from .trainers import FAMILIES

_BASE = "hv_train_network"


def main() -> None:
    """Check the musubi-tuner in the current folder and print a `Report`."""
    folder = Path("src", PACKAGE)
    sys.path.insert(0, str(folder.parent.resolve()))
    scripts = sorted(path.stem for path in folder.glob("*_train_network.py"))
    with contextlib.redirect_stdout(io.StringIO()):  # its modules print when they are imported
        problems = {f"{script}.py": check_script(script) for script in scripts}
        checks_early = problems.get(f"{_BASE}.py") is None and check_is_early()
    print(json.dumps(Report(problems=problems, checks_early=checks_early)))


def check_script(script: str) -> str | None:
    """What is wrong with a training script: it cannot be imported, or an assumption about its trainer does not hold.

    Args:
        script: its name without the ending.
    """
    try:
        module = importlib.import_module(f"{PACKAGE}.{script}")
    except Exception as error:  # noqa: BLE001 - whatever a foreign module raises
        return f"cannot be imported by this Python: {type(error).__name__}: {str(error).splitlines()[0]}"
    own = [cls for cls in vars(module).values() if getattr(cls, "__module__", None) == module.__name__]
    trainer = next((cls for cls in own if isinstance(cls, type) and cls.__name__ in FAMILIES), None)
    if trainer is None:
        return f"has no trainer that this plug-in knows; it knows {', '.join(FAMILIES)}"
    if FAMILIES[trainer.__name__].undefined:
        return FAMILIES[trainer.__name__].undefined
    try:
        for methods in (host.METHODS, host.QUALITY_METHODS):
            MUSUBI.check_methods(trainer, methods)
    except UnsupportedTrainerError as error:
        return str(error)
    return None


def check_is_early() -> bool:
    """Whether a run with a misspelled option is stopped by the plug-in's own message before a model is loaded.

    The model and the data set that it is given do not exist.
    """
    trainers = importlib.import_module(f"{PACKAGE}.{_BASE}")
    parser = trainers.hv_setup_parser(
        importlib.import_module(f"{PACKAGE}.training.parser_common").setup_parser_common()
    )
    wrong = ["--network_module", "kohya_patch", "--network_args", "freq_loss_metod=fft"]
    args = parser.parse_args(["--dit", "none", "--dataset_config", "none", "--sdpa", *wrong])
    try:
        trainers.HunyuanVideoNetworkTrainer().train(args)
    except SystemExit as stopped:
        return "freq_loss: " in str(stopped.code)
    except Exception:  # noqa: BLE001 - musubi-tuner looked for the files
        return False
    return False


if __name__ == "__main__":
    sys.argv = sys.argv[:1]
    main()
