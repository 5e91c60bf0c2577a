"""train_freq_aware.sh from a fresh clone: it creates an environment and trains in another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the files that git tracks or would track."""
    folder = tmp_path_factory.mktemp("clone")
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def test_from_an_empty_folder_to_a_lora(clone, tmp_path):
    """In a new environment that can import the packages of this one, so that nothing large is downloaded."""
    venv, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {**os.environ, "VENV": str(venv), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)

    def run(*arguments):
        command = ["bash", str(clone / "train_freq_aware.sh"), *arguments]
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=600)

    done = run("--max_train_steps", "1", "--style", "frames")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"installing into {venv}")
    assert sorted(path.name for path in (empty / "output").iterdir()) == [
        "comparison.png",
        "config.toml",
        "curves.png",
        "images",
        "tiny_lora-plain_mse.safetensors",
        "tiny_lora-plain_mse.state",
        "tiny_lora.safetensors",
        "tiny_lora.state",
    ]
    assert len(list((empty / "output" / "images" / "frames" / "1_frames").glob("*.png"))) == 24
    imported = [str(venv / "bin" / "python"), "-c", "import freq_loss_plugin; print(freq_loss_plugin.__file__)"]
    printed = subprocess.run(imported, cwd=empty, env=environment, capture_output=True, text=True).stdout.strip()
    assert Path(printed) == clone / "freq_loss_plugin" / "__init__.py"
    again = run("--help")
    assert again.returncode == 0
    assert "installing" not in again.stdout
    assert "--resume" in again.stdout
