"""Files and values as people write them: each once broke, or did something else in silence."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from freq_loss_plugin import ConfigError, image_files, image_folders
from freq_loss_plugin.analysis import fonts
from freq_loss_plugin.options.files import load_toml, read_text

pytest.importorskip("diffusers")

from freq_loss_plugin.engine import captions, dataset, plots, settings

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos" / "1_cat"
    folder.mkdir(parents=True)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"cat {number}", encoding="utf-8")
    return folder


def read(photos, **values):
    base = {"pretrained_model_name_or_path": "model", "train_data_dir": str(photos.parent), "resolution": "64"}
    return settings.read({**base, "caption_extension": ".txt", **values})[0]


# -- values ------------------------------------------------------------------------------------------------------------


def test_an_ending_without_its_dot(photos):
    assert read(photos, caption_extension="txt").caption_extension == ".txt"
    assert dataset.find(read(photos, caption_extension="txt")).examples[1].caption == "cat 1"


@pytest.mark.parametrize("ending", ["", "."])
def test_no_ending_is_refused(photos, ending):
    with pytest.raises(ConfigError, match=r"caption_extension = '.?': expected the ending of the caption files"):
        read(photos, caption_extension=ending)


@pytest.mark.parametrize(("written", "steps"), [(0, 0), (0.05, 10), (0.5, 100), (1, 1), (20, 20), (20.0, 20), (0.0, 0)])
def test_warmup_in_steps_or_as_a_fraction(photos, written, steps):
    made = read(photos, lr_warmup_steps=written, max_train_steps=200)
    assert made.warmup_steps == steps
    again = settings.read(_loads(settings.as_toml(made, settings.read(_minimal(photos))[1])))[0]
    assert again.warmup_steps == steps


@pytest.mark.parametrize("written", [1.5, -0.1, float("nan")])
def test_other_warmups_are_refused(photos, written):
    with pytest.raises(ConfigError, match="lr_warmup_steps"):
        read(photos, lr_warmup_steps=written)


def _minimal(photos):
    return {"pretrained_model_name_or_path": "model", "train_data_dir": str(photos.parent), "resolution": "64"}


def _loads(text):
    import toml

    return toml.loads(text)


def test_the_learning_rate_of_one_text_encoder_in_a_list(photos):
    assert read(photos, text_encoder_lr=[5e-5]).text_encoder_lr == 5e-5
    with pytest.raises(ConfigError, match="text_encoder_lr"):
        read(photos, text_encoder_lr=[5e-5, 1e-5])


def test_an_alpha_of_zero_is_the_rank(photos):
    assert read(photos, network_alpha=0, network_dim=16).alpha == 16.0
    assert read(photos, network_alpha=2, network_dim=16).alpha == 2.0


def test_network_args_as_one_text(photos):
    base = _minimal(photos)
    text = settings.read({**base, "network_args": "dist_match=0.01 freq_loss_method=fft"})[1]
    listed = settings.read({**base, "network_args": ["dist_match=0.01", "freq_loss_method=fft"]})[1]
    assert text == listed
    assert (text.dist_match, text.method) == (0.01, "fft")


# -- text files --------------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_part_of_a_text(photos, tmp_path):
    file = tmp_path / "notepad.toml"
    file.write_text("max_train_steps = 3\n", encoding="utf-8-sig")
    assert load_toml(file, "--config") == {"max_train_steps": 3}
    (photos / "0.txt").write_text("cat, cute", encoding="utf-8-sig")
    assert captions.read_caption(photos / "0.png", ".txt").text == "cat, cute"
    assert read_text(photos / "0.txt") == "cat, cute"
    config = tmp_path / "dataset.toml"
    config.write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{photos}'\n", encoding="utf-8-sig")
    assert len(image_folders.find_images(dataset_config=str(config))) == 3


def test_a_text_in_another_encoding(tmp_path):
    file = tmp_path / "a.toml"
    file.write_bytes("name = 'é'".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8 text; save it as UTF-8"):
        load_toml(file, "--config")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (r'train_data_dir = "D:\train\new"', "its backslashes were read as escapes"),
        (r'train_data_dir = "photos\new"', "its backslashes were read as escapes"),
        (r'anything = "D:\train"', "its backslashes were read as escapes"),
        (r"[[datasets]]" "\n" r'image_dir = "E:\faces"', "its backslashes were read as escapes"),
        (r'pretrained_model_name_or_path = "C:\AI\sd15.safetensors"', "Line 1 has a backslash in double quotes"),
        (r"ok = 1" "\n" r'train_data_dir = "C:\Users\me"', "Line 2 has a backslash in double quotes"),
    ],
)
def test_windows_paths_in_double_quotes(tmp_path, line, words):
    file = tmp_path / "windows.toml"
    file.write_text(line, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_toml(file, "--config")
    assert words in str(error.value)
    assert "forward slashes" in str(error.value)
    assert "single quotes" in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        r"train_data_dir = 'D:\train\new'",
        'train_data_dir = "D:/train/new"',
        r'train_data_dir = "D:\\train\\new"',
        'prompt = """two\nlines"""',
        'name = "a\\tb"',
    ],
)
def test_what_is_written_right_is_read(tmp_path, line):
    file = tmp_path / "right.toml"
    file.write_text(line, encoding="utf-8")
    assert len(load_toml(file, "--config")) == 1


def test_a_file_that_is_no_toml_and_has_no_backslash(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("this is no toml", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not a TOML file") as error:
        load_toml(file, "--config")
    assert "backslash" not in str(error.value)


def test_captions_of_every_kind_are_named(photos):
    (photos / "0.txt").write_text("first line\nsecond line\n", encoding="utf-8")
    (photos / "1.txt").write_text("\n \n", encoding="utf-8")
    (photos / "2.txt").unlink()
    found = dataset.find(read(photos))
    assert [example.caption for example in found.examples] == ["first line", "", "cat"]
    text = "\n".join(found.warnings)
    assert text.count("1 images, ") == 3
    for words in (captions.MANY_LINES, captions.EMPTY, "no caption file (*.txt)"):
        assert words in text


def test_captions_that_are_too_long_are_counted():
    from transformers import CLIPTokenizer

    from freq_loss_plugin.toy_model import model_folder

    tokenizer = CLIPTokenizer.from_pretrained(model_folder() / "tokenizer")
    assert captions.too_long(["red " * 75, "a"], tokenizer) == []
    (warning,) = captions.too_long(["red " * 76, "red " * 90, "red " * 90, "a"], tokenizer)
    assert "2 captions have more than 75 tokens, up to 90" in warning


# -- images ------------------------------------------------------------------------------------------------------------


def pixels_of(photos, name):
    examples = dataset.find(read(photos)).examples
    return dataset.load_pixels(next(example for example in examples if example.file.name == name))


def test_hidden_colors_of_transparent_images_are_not_trained(photos):
    hidden = np.zeros((64, 64, 4), dtype=np.uint8)
    hidden[..., 0] = 200
    hidden[:32, :, 3] = 255
    Image.fromarray(hidden).save(photos / "0.png")
    Image.fromarray(np.dstack([hidden[..., :3], np.full((64, 64), 255, np.uint8)])).save(photos / "1.png")
    pixels = pixels_of(photos, "0.png")
    assert torch.allclose(pixels[:, 40], torch.ones(3, 64))
    assert pixels[0, 10, 0] == pytest.approx(200 / 127.5 - 1)
    (warning,) = [each for each in dataset.find(read(photos)).warnings if "transparent" in each]
    assert "1 images" in warning  # the other one has an alpha channel and is opaque
    assert "1_cat/0.png" in warning.replace("\\", "/")


def test_a_palette_with_a_transparent_color(photos):
    image = Image.new("P", (64, 64), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 32, 64, 64))
    image.save(photos / "0.png", transparency=0)
    pixels = pixels_of(photos, "0.png")
    assert torch.equal(pixels[:, 0, 0], torch.ones(3))
    assert torch.equal(pixels[:, 40, 0], torch.tensor([-1.0, -1.0, 1.0]))


def test_gray_images_of_16_bits_keep_their_brightness(photos):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (64, 1))).save(photos / "0.png")
    pixels = pixels_of(photos, "0.png")
    expected = torch.from_numpy(ramp / 65535 * 2 - 1).float()
    torch.testing.assert_close(pixels[1, 5], expected, atol=0.005, rtol=0)
    assert any(image_files.DEEP in warning for warning in dataset.find(read(photos)).warnings)


def test_photos_that_are_stored_rotated_are_named(photos):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 64), "red").save(photos / "0.jpg", exif=exif)
    (warning,) = [each for each in dataset.find(read(photos)).warnings if "rotated" in each]
    assert "0.jpg" in warning


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"])
def test_every_mode_of_pillow_becomes_rgb(mode):
    image = (
        Image.new("RGB", (8, 8), (10, 120, 200)).convert("L").convert(mode) if mode in ("I", "F", "1", "LA") else None
    )
    image = image or Image.new("RGB", (8, 8), (10, 120, 200)).convert(mode)
    converted = image_files.as_rgb(image)
    assert converted.mode == "RGB"
    assert converted.size == (8, 8)


def test_files_that_sd_scripts_does_not_see_are_left_out_and_named(photos):
    before = [example.file for example in dataset.find(read(photos)).examples]
    Image.new("RGB", (64, 64)).save(photos / "scan.TIF")
    (photos / "IMG_0001.HEIC").write_bytes(b"from a phone")
    (photos / "._0.png").write_bytes(b"written by macOS beside every file")
    data = dataset.find(read(photos))
    assert [example.file for example in data.examples] == before
    assert any("2 images, left out" in text and "IMG_0001.HEIC" in text for text in data.warnings)


def test_a_format_whose_package_is_missing_is_named(photos, monkeypatch):
    (photos / "0.jxl").write_bytes(b"\xff\x0a not really")
    monkeypatch.setattr(Image, "registered_extensions", lambda: {".png": "PNG"})
    with pytest.raises(ConfigError, match="pip install pillow-jxl-plugin"):
        dataset.find(read(photos))


def test_jxl_is_read_where_its_package_is_installed(photos):
    pytest.importorskip("pillow_jxl")
    with Image.open(photos / "0.png") as image:
        image.save(photos / "9.jxl", lossless=True)
    assert torch.equal(pixels_of(photos, "9.jxl"), pixels_of(photos, "0.png"))


# -- plots, logs, states -----------------------------------------------------------------------------------------------


def test_prompts_with_dollars_and_in_any_script_are_drawn(tmp_path):
    rows = {"training images": torch.rand(4, 3, 8, 8), "before": torch.rand(4, 3, 8, 8)}
    prompts = ["smile $_$ face", r"\frac{1}{2} $x", "\u732b\u304c\u5ea7\u3063\u3066\u3044\u308b", "plain"]
    file = plots.comparison(tmp_path / "comparison.png", rows, prompts)
    assert file.stat().st_size > 1000


def test_a_prompt_that_no_font_can_draw_is_numbered(monkeypatch):
    monkeypatch.setattr(fonts, "fonts", lambda: ["DejaVu Sans"])
    assert not fonts.is_drawable("\u732b cat")
    assert fonts.is_drawable("a cat, naïve")


def test_every_run_logs_into_a_folder_of_its_own(photos, tmp_path):
    from freq_loss_plugin.engine import tracking

    made = read(photos, logging_dir=str(tmp_path / "logs"), output_name="lora")
    first = tracking._run_name(made)
    (tmp_path / "logs" / first).mkdir(parents=True)
    second = tracking._run_name(made)
    assert first != second
    assert first.startswith("lora/")
    assert tracking._run_name(read(photos, log_with="wandb", output_name="lora")) == "lora"


def test_features_that_cannot_be_written_say_where_they_belong(photos, monkeypatch):
    from freq_loss_plugin.guidance_token import extract

    def read_only(file, write):
        raise OSError(f"{file} cannot be written: Read-only file system")

    monkeypatch.setattr(extract, "write_whole", read_only)
    monkeypatch.setattr(extract.guidance, "contents", lambda *arguments: ({}, {}))

    class Clip:
        identity = "x"

    with pytest.raises(ConfigError, match="Features lie beside their images") as error:
        extract._save(photos / "0.png", torch.zeros(4), Clip())
    assert "--resume" not in str(error.value)


# -- the script --------------------------------------------------------------------------------------------------------


def test_inspect_of_an_output_that_cannot_be_written_does_not_speak_of_resuming(photos, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("x", encoding="utf-8")
    command = [sys.executable, "-m", "freq_loss_plugin", "inspect", "--train_data_dir", str(photos.parent)]
    done = subprocess.run(
        [*command, "--json", str(blocked / "a.json")],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "--resume" not in done.stderr


def test_the_sources_of_a_configuration_with_a_byte_order_mark(photos, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f"train_data_dir = '{photos.parent}'\n", encoding="utf-8-sig")
    options = argparse.Namespace(config_file=file, train_data_dir=None, reg_data_dir=None, dataset_config=None)
    options.in_json = None
    assert image_folders.read_config(options) == {"train_data_dir": str(photos.parent)}
