"""Creates a Python environment and runs ``freq_loss_plugin train`` in it: what the scripts train_freq_aware.* call.

It imports the standard library alone, since nothing is installed yet. The environment variable VENV names the folder of
the environment, PYTHON the interpreter that the scripts call.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEAST_PYTHON = (3, 10)
# Marks a complete environment, and says with which Python it was made; outdated if pyproject.toml is newer.
_MARKER = ".freq_loss_installed"


def main() -> int:
    """Make the environment where it is missing or outdated, and run the command line in it."""
    if sys.version_info < LEAST_PYTHON:
        version = ".".join(map(str, LEAST_PYTHON))
        print(f"{sys.executable} is Python {sys.version.split()[0]}: expected {version} or newer; set PYTHON to one")
        return 1
    folder = Path(os.environ.get("VENV") or ROOT / ".venv-train")
    if not _is_current(folder):
        print(f"installing into {folder}; torch is large, so this takes some minutes the first time", flush=True)
        if not _make(folder):
            return 1
    command = [str(python_of(folder)), "-m", "freq_loss_plugin", "train", *sys.argv[1:]]
    if os.name != "nt":
        os.execv(command[0], command)  # in place of this process, so that Ctrl-C reaches the training alone
    return subprocess.call(command)


def python_of(folder: Path, system: str = os.name) -> Path:
    """The interpreter of an environment."""
    return folder / "Scripts" / "python.exe" if system == "nt" else folder / "bin" / "python"


def _is_current(folder: Path) -> bool:
    marker = folder / _MARKER
    if not marker.is_file() or marker.stat().st_mtime <= (ROOT / "pyproject.toml").stat().st_mtime:
        return False
    return not _is_of_another_python(folder)


def _is_of_another_python(folder: Path) -> bool:
    """Whether PYTHON asks for another interpreter than the environment was made with."""
    marker = folder / _MARKER
    made_with = marker.read_text(encoding="utf-8") if marker.is_file() else ""
    return bool(os.environ.get("PYTHON") and made_with and made_with != _identity())


def _identity() -> str:
    return f"{os.path.realpath(sys.executable)}\n{sys.version}"


def _make(folder: Path) -> bool:
    """Create the environment and install into it; False where that failed, which has been printed."""
    python = python_of(folder)
    # An attempt without Debian's python3-venv leaves an environment without pip.
    if not _works(python) or _is_of_another_python(folder):
        done = subprocess.call([sys.executable, "-m", "venv", "--clear", str(folder)])
        if done != 0 or not _works(python):
            print(
                f"\n{sys.executable} cannot create environments; on Debian and Ubuntu: sudo apt install "
                f"python{sys.version_info[0]}.{sys.version_info[1]}-venv. Or set PYTHON to another Python"
            )
            return False
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.call([*install, "--editable", f"{ROOT}[train]"]) != 0:
        print("\nthe installation failed; see above. Run the same command to try again")
        return False
    (folder / _MARKER).write_text(_identity(), encoding="utf-8")
    return True


def _works(python: Path) -> bool:
    if not python.is_file():
        return False
    tried = subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True, check=False)
    return tried.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
