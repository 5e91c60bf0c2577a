"""Where the two hosts are, and whether the tests that need them can run here."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

SD_SCRIPTS_PACKAGES = (
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "tensorboard",
    "cv2",
    "skimage",
    "open_clip",
)

COMFYUI_PACKAGES = ("torchvision", "torchaudio", "comfyui_frontend_package", "torchsde", "av", "alembic", "aiohttp")


def find(variable: str, name: str) -> Path | None:
    """The checkout named by the environment variable, or the one in the cache folder, or None."""
    given = os.environ.get(variable)
    candidates = [Path(given)] if given else [Path.home() / ".cache" / "freq_loss_plugin" / name]
    return next((path.resolve() for path in candidates if path.is_dir()), None)


def sd_scripts() -> Path:
    """The checkout of sd-scripts; skips the calling test where there is none, or where its packages are missing."""
    path = find("SD_SCRIPTS_DIR", "sd-scripts")
    if path is None:
        pytest.skip("no sd-scripts: set SD_SCRIPTS_DIR, or clone it to ~/.cache/freq_loss_plugin/sd-scripts")
    missing = [name for name in SD_SCRIPTS_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"sd-scripts is at {path}, but this Python lacks {', '.join(missing)}; run tests/run.sh")
    return path


def comfyui() -> Path:
    """The checkout of ComfyUI; skips the calling test where there is none, or where its packages are missing."""
    path = find("COMFYUI_DIR", "ComfyUI")
    if path is None:
        pytest.skip("no ComfyUI: set COMFYUI_DIR, or clone it to ~/.cache/freq_loss_plugin/ComfyUI")
    missing = [name for name in COMFYUI_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"ComfyUI is at {path}, but this Python lacks {', '.join(missing)}; run tests/run.sh")
    return path
