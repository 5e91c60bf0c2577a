"""Consoles and files where a name cannot be written: Windows' pipes, and names whose bytes are no text."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import bad_images
import pytest
from bad_images import scene
from hooked import NetworkTrainer
from PIL import Image

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.__main__ import main
from freq_loss_plugin.toy_model import model_folder
from kohya_patch import report
from kohya_patch.sd_scripts.trainers import TrainingRun

pytest.importorskip("diffusers")
# Warnings of diffusers, transformers and accelerate are not ours.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parent.parent
CAT = "\N{CJK UNIFIED IDEOGRAPH-732B}"
ENCODINGS = ("cp1252", "ascii")


@pytest.fixture
def images(tmp_path):
    """Images with names that few consoles can show, one of them no text, and one that trainers do not read."""
    folder = bad_images.write(tmp_path / "data" / f"1_{CAT}", [scene(0)])
    scene(1).save(folder / f"{CAT}.png")
    Image.new("RGB", (64, 64)).save(folder / f"{CAT}.tif")
    try:
        scene(2).save(folder / os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("this file system has only names that are text")
    return folder.parent


def console(monkeypatch, encoding):
    """Standard output as Python opens it for a pipe of this encoding."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    return stream.buffer


@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-8"])
def test_inspect_prints_every_name(images, monkeypatch, encoding):
    output = console(monkeypatch, encoding)
    assert main(["inspect", "--train_data_dir", str(images)]) == 0
    text = output.getvalue().decode(encoding)
    assert "\\udcff.png" in text
    assert (CAT if encoding == "utf-8" else "\\u732b.png") in text
    assert "3 images: 3 full quality" in text


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_engine_prints_every_name(images, make_settings, tmp_path, monkeypatch, encoding):
    from engine_runs import write_toml

    file = write_toml(tmp_path, make_settings(train_data_dir=str(images), resolution="128", max_train_steps=1))
    output = console(monkeypatch, encoding)
    assert main(["train", "--config", str(file)]) == 0
    text = output.getvalue().decode(encoding)
    assert "1 images, left out" in text
    assert "1_\\u732b/\\u732b.tif" in text
    assert "1_\\u732b/\\udcff.png" in text  # it has no caption


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_extraction_prints_every_name(images, monkeypatch, encoding):
    (images / f"1_{CAT}" / f"{CAT}2.png").write_bytes(b"no image")
    output = console(monkeypatch, encoding)
    arguments = ["--train_data_dir", str(images), "--clip", str(model_folder() / "image_encoder")]
    assert main(["extract-features", *arguments]) == 1
    assert "\\u732b2.png: no image" in output.getvalue().decode(encoding)
    assert len(list(images.rglob("*.clip.safetensors"))) == 3


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_block_of_a_run_is_printed(monkeypatch, encoding):
    pytest.importorskip("accelerate")
    output = console(monkeypatch, encoding)
    report.announce(TrainingRun(NetworkTrainer(), argparse.Namespace()), FreqLossConfig(), f"{CAT}.lora")
    assert "freq_loss_network_module = \\u732b.lora" in output.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_installer_prints_every_name(tmp_path, encoding):
    done = subprocess.run(
        [sys.executable, str(ROOT / "install.py"), "--check", "--sd-scripts", str(tmp_path / CAT)],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        encoding=encoding,
        timeout=120,
    )
    assert done.returncode == 1
    assert "\\u732b has no train_network.py" in done.stdout, done.stderr


def test_files_hold_names_that_are_no_text(images, tmp_path, capsys):
    files = {kind: tmp_path / f"report.{kind}" for kind in ("json", "html")}
    arguments = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    assert main(["inspect", "--train_data_dir", str(images), *arguments]) == 0
    found = [Path(image["file"]) for image in json.loads(files["json"].read_text(encoding="utf-8"))["images"]]
    assert all(file.is_file() for file in found)
    assert any(os.fsencode(file).endswith(b"/\xff.png") for file in found)
    page = files["html"].read_text(encoding="utf-8")
    assert "\\udcff.png" in page
    assert f"{CAT}.png" in page
