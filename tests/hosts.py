"""Where checkouts of the hosts are, which versions they have, and whether their tests can run here.

    python tests/hosts.py ComfyUI      the folders of one host, the newest checkout first

A host's variable names checkouts, separated as in PATH; without one, those in ~/.cache/freq_loss_plugin are taken. A
pytest process uses one of each host, the newest; `matrix` starts one more for each of the others.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

CACHE = Path.home() / ".cache" / "freq_loss_plugin"


@dataclass(frozen=True)
class Host:
    """A program that the plug-in is part of.

    Attributes:
        name: human-readable.
        variable: the environment variable that names its checkouts.
        file: what every checkout of it has.
        packages: what its tests import, as far as pip may not have installed it.
        versions: the commits in README's compatibility table, and the versions that they are.
    """

    name: str
    variable: str
    file: str
    packages: tuple[str, ...]
    versions: dict[str, str]

    def checkouts(self) -> list[Path]:
        """All checkouts, by the dates of their commits, the newest first.

        Raises:
            FileNotFoundError: the variable names something else.
        """
        if self.variable not in os.environ:
            folders = sorted(CACHE.iterdir()) if CACHE.is_dir() else []
            return sorted(filter(self._is_checkout, folders), key=_commit_time, reverse=True)
        paths = [Path(name).resolve() for name in os.environ[self.variable].split(os.pathsep) if name]
        for path in paths:
            if not self._is_checkout(path):
                raise FileNotFoundError(f"{self.variable} names {path}, which has no {self.file}: no {self.name}")
        return sorted(paths, key=_commit_time, reverse=True)

    def checkout(self) -> Path:
        """The newest; skips the calling test where there is none, or where packages are missing."""
        paths = self.checkouts()
        if not paths:
            pytest.skip(f"no {self.name}: set {self.variable}, or clone it to {CACHE}")
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"{self.name} is at {paths[0]}, but this Python lacks {', '.join(missing)}; run tests/run.sh")
        return paths[0]

    def title(self, path: Path) -> str:
        """Name, version and commit of a checkout: "ComfyUI 0.3.64 (a125cd84 of 2025-10-12)"."""
        commit = _git(path, "log", "-1", "--abbrev=8", "--format=%h of %cs") or "no git"
        version = self.versions.get(commit[:8], "")
        return f"{self.name} {version} ({commit})".replace("  ", " ")

    def not_found(self) -> list[str]:
        """The versions in README's compatibility table of which there is no checkout."""
        here = {_git(path, "log", "-1", "--abbrev=8", "--format=%h") for path in self.checkouts()}
        return [f"{self.name} {version} ({commit})" for commit, version in self.versions.items() if commit not in here]

    def _is_checkout(self, path: Path) -> bool:
        return (path / self.file).is_file()


SD_SCRIPTS = Host(
    "sd-scripts",
    "SD_SCRIPTS_DIR",
    "train_network.py",
    ("torchvision", "diffusers", "transformers", "accelerate", "tensorboard", "cv2", "skimage", "open_clip"),
    {"d0b5c0e5": "main", "48d368fa": "main", "6721028c": "v0.11.1", "37a1cbbc": "dev"},
)
COMFYUI = Host(
    "ComfyUI",
    "COMFYUI_DIR",
    "comfyui_version.py",
    ("torchvision", "torchaudio", "comfyui_frontend_package", "torchsde", "av", "alembic", "aiohttp"),
    {"a125cd84": "0.3.64", "783545f6": "0.33.0"},
)
MUSUBI_TUNER = Host(
    "musubi-tuner",
    "MUSUBI_TUNER_DIR",
    "src/musubi_tuner/training/trainer_base.py",
    ("torchvision", "diffusers", "transformers", "accelerate", "av", "cv2", "einops", "easydict", "ftfy"),
    {"30c658c4": "0.3.4", "e0cbd8f3": "main", "4d3ddce8": "dev"},
)


def sd_scripts() -> Path:
    """The checkout of sd-scripts that this process tests with, or skip."""
    return SD_SCRIPTS.checkout()


def comfyui() -> Path:
    """The checkout of ComfyUI that this process tests with, or skip."""
    return COMFYUI.checkout()


def musubi_tuner() -> Path:
    """The checkout of musubi-tuner that this process tests with, whose package can be imported, or skip."""
    checkout = MUSUBI_TUNER.checkout()
    if str(checkout / "src") not in sys.path:
        sys.path.append(str(checkout / "src"))
    return checkout


def pinned_frontend(comfyui: Path) -> str:
    """The version of the frontend that a ComfyUI asks for."""
    requirements = (comfyui / "requirements.txt").read_text(encoding="utf-8")
    found = re.search(r"^comfyui-frontend-package==(\S+)", requirements, re.MULTILINE)
    assert found is not None, f"{comfyui}/requirements.txt pins no frontend"
    return found[1]


def _commit_time(path: Path) -> int:
    return int(_git(path, "log", "-1", "--format=%ct") or 0)


def _git(path: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(path), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    for host in (SD_SCRIPTS, COMFYUI, MUSUBI_TUNER):
        if host.name == sys.argv[1]:
            print(*host.checkouts(), sep="\n")
