"""``--resume`` looks at what a run trains on, and not at where it lies or how its path is written."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from engine_runs import OFF, ON, load_lora
from safetensors.torch import load_file, save_file

from freq_loss_plugin import ConfigError
from freq_loss_plugin.engine import dataset, run
from freq_loss_plugin.toy_model import model_folder

# Warnings of diffusers, transformers and accelerate are not ours.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def begun(make_settings, noise_images, tmp_path):
    """Settings of a run that saved its state after two of four steps; images and model are its own."""
    shutil.copytree(noise_images, tmp_path / "data")
    shutil.copytree(model_folder(), tmp_path / "model")
    settings = make_settings(
        train_data_dir=str(tmp_path / "data"), pretrained_model_name_or_path=str(tmp_path / "model")
    )
    run.train(dataclasses.replace(settings, max_train_steps=2), ON)
    return settings


def test_moved_renamed_and_written_another_way(begun, make_settings, tmp_path, monkeypatch):
    """The rest of the run is the same bit for bit; the images' new names are in another order."""
    whole = load_lora(run.train(make_settings(output_name="whole"), ON).lora)
    shutil.move(tmp_path / "data", tmp_path / "photos")
    shutil.move(tmp_path / "model", tmp_path / "sd15")
    (tmp_path / "photos" / "1_noise").rename(tmp_path / "photos" / "1_other")
    for number in range(5):
        for ending in ("png", "txt"):
            file = tmp_path / "photos" / "1_other" / f"{number}.{ending}"
            file.rename(file.with_stem(f"new{9 - number}"))
    monkeypatch.chdir(tmp_path)
    moved = dataclasses.replace(
        begun,
        train_data_dir="./photos/",
        pretrained_model_name_or_path="sd15",
        resolution="64,64",
        network_alpha=1,
        max_grad_norm=1,
    )
    torch.testing.assert_close(load_lora(run.train(moved, ON, resume=True).lora), whole, rtol=0, atol=0)


def test_validation_images_are_the_same_after_renaming(noise_images, make_settings, tmp_path):
    shutil.copytree(noise_images, tmp_path / "data")
    settings = make_settings(train_data_dir=str(tmp_path / "data"))

    def held_out():
        return [example.caption for example in dataset.split(dataset.find(settings), 0.34, seed=1)[1]]

    before = held_out()
    for number in range(5):
        for ending in ("png", "txt"):
            file = tmp_path / "data" / "1_noise" / f"{number}.{ending}"
            file.rename(file.with_stem(f"new{9 - number}"))
    assert held_out() == before


def _change(data: Path) -> None:
    shutil.copy(data / "1_noise" / "0.png", data / "1_noise" / "1.png")


def _add(data: Path) -> None:
    shutil.copy(data.parent / "new.png", data / "1_noise" / "new.png")


def _remove(data: Path) -> None:
    (data / "1_noise" / "3.png").unlink()


def _repeat(data: Path) -> None:
    (data / "1_noise").rename(data / "3_noise")


CHANGES = {
    "changed": (_change, r"1 missing \(1_noise/1\.png\); 1 with other repeats \(1_noise/0\.png\)"),
    "added": (_add, r"1 added \(1_noise/new\.png\)"),
    "removed": (_remove, r"1 missing \(1_noise/3\.png\)"),
    "repeated": (_repeat, r"5 with other repeats \(3_noise/0\.png"),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_other_images_are_refused(begun, tmp_path, change, words):
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "new.png")
    change(tmp_path / "data")
    with pytest.raises(ConfigError, match=words):
        run.train(begun, ON, resume=True)


def test_an_image_that_was_replaced_is_named_once(begun, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "data" / "1_noise" / "2.png")
    with pytest.raises(ConfigError, match=r"was saved: 1 changed \(1_noise/2\.png\)\. Batches"):
        run.train(begun, ON, resume=True)


def test_another_model_under_the_same_name_is_refused(begun, tmp_path):
    (file,) = (tmp_path / "model" / "unet").glob("*.safetensors")
    weights = load_file(file)
    weights["conv_in.weight"] = weights["conv_in.weight"] + 0.01
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ConfigError, match="was saved with another model than pretrained_model_name_or_path"):
        run.train(begun, ON, resume=True)


def test_other_captions_are_a_warning(begun, tmp_path, capsys):
    (tmp_path / "data" / "1_noise" / "2.txt").write_text("another one", encoding="utf-8")
    run.train(begun, ON, resume=True)
    assert "warning: 1 images have other captions than before: 1_noise/2.png" in capsys.readouterr().out


def test_the_same_image_twice_is_resumed(make_settings, noise_images, tmp_path):
    shutil.copytree(noise_images, tmp_path / "data")
    shutil.copy(tmp_path / "data" / "1_noise" / "0.png", tmp_path / "data" / "2_more" / "copy.png")
    settings = make_settings(train_data_dir=str(tmp_path / "data"))
    run.train(dataclasses.replace(settings, max_train_steps=1), OFF)
    assert run.train(settings, OFF, resume=True).step == 4
