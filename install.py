"""Installs the plug-in.

    python install.py --sd-scripts PATH           install for sd-scripts; use the Python that runs sd-scripts
    python install.py --musubi-tuner PATH         the same for musubi-tuner
    python install.py --sd-scripts PATH --check   report only; exit status 1 where something is missing
    python install.py                             what the ComfyUI Manager runs after it has cloned the pack

It can be run again, for instance after an update of the plug-in. Nothing is written below PATH.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # its package needs torch, which the Python that runs this may lack
    from kohya_patch.host import Report

ROOT = Path(__file__).resolve().parent
DISTRIBUTION = "freq-loss-plugin"
# The modules that requirements.txt installs, and what happens without them.
COMFYUI_PACKAGES = {
    "pytorch_wavelets": "wavelet bands will be FFT bands",
    "pywt": "wavelet bands will be FFT bands",
    "matplotlib": "nodes that draw plots will raise an error",
}
CHECKS_EARLY = "Options that cannot work raise an error before any model is loaded."
CHECKS_LATE = (
    "Options that cannot work raise an error only after the models were loaded: either this Python does not read the "
    "plug-in's .pth file when it starts (run install.py without --check), or the trainers of this sd-scripts do not "
    "start with a call that the plug-in knows."
)
TOML_LINES = """\
    network_module = "kohya_patch"      # was "networks.lora", or another one of its own

    [freq_loss]
    freq_loss_timesteps = "shared"      # no extra forward pass
    freq_loss_gradient_ratio = 0.1      # the term's gradient is a tenth of the base loss's
"""


class Program(NamedTuple):
    """A training program.

    Attributes:
        name: as people write it.
        repository: where it is from.
        base: the script that is checked first.
        scripts: the folder in which its scripts are.
        package: the folder of kohya_patch that is for it.
        needs: packages that its Python has.
    """

    name: str
    repository: str
    base: str
    scripts: str
    package: str
    needs: tuple[str, ...]


SD_SCRIPTS = Program(
    "sd-scripts",
    "kohya-ss/sd-scripts",
    "train_network.py",
    ".",
    "sd_scripts",
    ("torch", "accelerate", "diffusers", "toml"),
)
MUSUBI_TUNER = Program(
    "musubi-tuner",
    "kohya-ss/musubi-tuner",
    "hv_train_network.py",
    "src/musubi_tuner",
    "musubi",
    ("torch", "accelerate", "diffusers", "toml", "av"),
)


def main() -> int:
    """Run the installation that the command line asks for; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # as freq_loss_plugin.console, which needs torch
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = parser.add_mutually_exclusive_group()
    programs.add_argument("--sd-scripts", type=Path, metavar="PATH", help="the folder with train_network.py")
    programs.add_argument("--musubi-tuner", type=Path, metavar="PATH", help="the folder with src/musubi_tuner")
    parser.add_argument("--check", action="store_true", help="change nothing, only report")
    options = parser.parse_args()
    program = SD_SCRIPTS if options.musubi_tuner is None else MUSUBI_TUNER
    path = options.sd_scripts or options.musubi_tuner
    if path is None:
        if options.check:
            parser.error("--check needs --sd-scripts PATH or --musubi-tuner PATH")
        return install_for_comfyui()
    return install_for(program, path.expanduser(), check_only=options.check)


def install_for_comfyui() -> int:
    """Install missing packages of requirements.txt; silent and offline if none is missing.

    Most nodes work without these packages, so a failure is a warning and does not fail the installation.
    """
    missing = [name for name in COMFYUI_PACKAGES if importlib.util.find_spec(name) is None]
    if missing and _pip("install", "--quiet", "-r", str(ROOT / "requirements.txt")):
        effects = "; ".join(dict.fromkeys(COMFYUI_PACKAGES[name] for name in missing))
        print(
            f"freq_loss_plugin: {', '.join(missing)} could not be installed: {effects}. To try again: "
            f"{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}"
        )
    return 0


def install_for(program: Program, path: Path, *, check_only: bool) -> int:
    """Install the plug-in into this Python and report on the checkout.

    Args:
        program: what it is installed for.
        path: its folder.
        check_only: report without installing anything.

    Returns:
        The exit status.
    """
    problems = [*_check_python(program), *_check_folder(program, path)] or check_checkout(program, path)
    if not problems and not check_only:
        print(f"installing the plug-in for {sys.executable}")
        if _pip("install", "--quiet", str(ROOT)):
            problems = ["pip failed; see its output above"]
    problems = problems or _check_installation(program, path)
    report: Report = {"problems": {}, "checks_early": False} if problems else check_host(program, path)
    _print_report(program, path, report)
    if problems:
        print("\nNot ready:")
        print("\n".join(f"  - {problem}" for problem in problems))
        return 1
    print(f"\nReady. In the TOML that you train with (--config_file):\n\n{TOML_LINES}")
    print(f"Train as usual. {CHECKS_EARLY if report['checks_early'] else CHECKS_LATE}")
    return 0


def check_checkout(program: Program, path: Path) -> list[str]:
    """The problems that prevent training with a checkout, in sentences.

    Args:
        program: what it is a checkout of.
        path: its folder; nothing is written there.
    """
    problem = check_host(program, path, plugin=ROOT)["problems"][program.base]
    return [f"{program.base}: {problem}"] if problem else []


def check_host(program: Program, path: Path, plugin: Path | None = None) -> Report:
    """Check the plug-in against the checkout's code, in a separate process; no model is loaded.

    Args:
        program: what it is a checkout of.
        path: its folder; nothing is written there.
        plugin: the folder to import the plug-in from; None for the installed one.
    """
    environment = dict(os.environ)
    if plugin is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(plugin), environment.get("PYTHONPATH"))))
    command = [sys.executable, "-B", "-W", "ignore", "-m", f"kohya_patch.{program.package}.host_check", program.base]
    done = subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        failed = f"the check of {path} failed: {_last_line(done.stderr)}"
        return {"problems": {program.base: failed}, "checks_early": False}
    return json.loads(_last_line(done.stdout))


def _print_report(program: Program, path: Path, report: Report) -> None:
    """Print the versions, and which training scripts can be used."""
    # Python does not always search this folder: ComfyUI's portable version has an embedded Python, which does not.
    sys.path.insert(0, str(ROOT))
    from kohya_patch.host import version  # noqa: PLC0415 - found from here on

    print(f"Python       {sys.version.split()[0]} at {sys.executable}")
    print(f"{program.name:12} {version(path)} in {path}")
    print(f"plug-in      {_installed_version() or 'not installed'}")
    for script, problem in report["problems"].items():
        print(f"{'not usable   ' if problem else 'usable       '}{script}{f': {problem}' if problem else ''}")


def _last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1]


def _check_python(program: Program) -> list[str]:
    if sys.version_info < (3, 10):  # noqa: UP036 - pip has not been asked yet
        return [f"Python {sys.version.split()[0]}: the plug-in and {program.name} need 3.10 or newer"]
    missing = [name for name in program.needs if importlib.util.find_spec(name) is None]
    if not missing:
        return []
    return [
        f"{sys.executable} has no {', '.join(missing)}: this is not the Python that runs {program.name}. Activate its "
        "virtual environment (for instance: source venv/bin/activate) and run install.py again"
    ]


def _check_folder(program: Program, path: Path) -> list[str]:
    if (path / program.scripts / program.base).is_file():
        return []
    return [f"{path} has no {Path(program.scripts, program.base)}: expected the folder of {program.repository}"]


def _check_installation(program: Program, path: Path) -> list[str]:
    """Import the installed plug-in in the folder of the program, as training will, and compute bands with it."""
    if _installed_version() is None:
        return ["the plug-in is not installed for this Python; run install.py without --check"]
    code = (
        f"import torch, kohya_patch.{program.package}.network, freq_loss_plugin as f; "
        "f.frequency_decomposition(torch.randn(1, 4, 8, 8)); print(f.FreqLossConfig().resolved_method)"
    )
    folder = path if path.is_dir() else None
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=folder, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        return [f"the installed plug-in does not import: {_last_line(done.stderr)}"]
    if done.stdout.split() != ["wavelet"]:
        return ["the wavelet library is missing, so FFT bands would be used: pip install pytorch_wavelets PyWavelets"]
    return []


def _installed_version() -> str | None:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pip(*arguments: str) -> int:
    """Run this Python's pip, or uv if the environment was created without pip; returns the exit status."""
    command = [sys.executable, "-m", "pip", *arguments]
    uv = shutil.which("uv")
    if importlib.util.find_spec("pip") is None and uv:
        command = [uv, "pip", arguments[0], "--python", sys.executable, *arguments[1:]]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
