"""``extract-features`` with a small CLIP: it writes the features that transformers' CLIP computes."""

from __future__ import annotations

from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from PIL import Image

from freq_loss_plugin import image_files
from freq_loss_plugin.guidance_token import features as guidance

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP of random weights with a projection of 64, as a folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**layers, "image_size": 32, "patch_size": 8}, text_config=layers, projection_dim=64
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    for name, size, mode in (
        ("2_a/1.png", (40, 50), "RGB"),
        ("2_a/2.png", (64, 30), "RGBA"),
        ("1_b/3.jpg", (33, 33), "L"),
    ):
        file = tmp_path / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
        values = generator.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
        Image.fromarray(values.squeeze(), mode).save(file)
    return tmp_path / "train"


def extract(*arguments):
    return forks.run(["-m", "freq_loss_plugin", "extract-features", *map(str, arguments)], [ROOT], timeout=300)


def images_of(data):
    return sorted(path for path in data.rglob("*") if path.suffix in (".png", ".jpg"))


@pytest.mark.versions
def test_features_are_those_of_clips_get_image_features(clip, data):
    from transformers import CLIPImageProcessor, CLIPModel

    done = extract("--train_data_dir", data, "--clip", clip, "--batch_size", 2)
    assert done.returncode == 0, done.stdout
    assert "3 images, 0 of them up to date" in done.stdout
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPImageProcessor.from_pretrained(clip)
    loaded = guidance.load(dict.fromkeys(images_of(data), 1.0), "x")
    assert loaded.clip.startswith(f"{clip.name}@")
    for image, features in loaded.by_image.items():
        with Image.open(image) as opened, torch.no_grad():
            white = Image.new("RGBA", opened.size, "white")
            seen = Image.alpha_composite(white, opened.convert("RGBA")).convert("RGB")
            pixels = processor(images=seen, return_tensors="pt").pixel_values
            expected = model.get_image_features(pixel_values=pixels)
        expected = getattr(expected, "pooler_output", expected)[0]
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
        assert features.norm() != pytest.approx(1, abs=1e-3)


def test_current_features_are_kept_and_changed_images_are_extracted_again(clip, data):
    assert extract("--train_data_dir", data, "--clip", clip).returncode == 0
    files = [guidance.feature_file(image) for image in images_of(data)]
    times = [file.stat().st_mtime_ns for file in files]
    done = extract("--train_data_dir", data, "--clip", clip)
    assert "3 images, 3 of them up to date" in done.stdout
    assert [file.stat().st_mtime_ns for file in files] == times
    first, second, third = images_of(data)
    Image.new("RGB", (20, 20), "red").save(first)
    guidance.feature_file(second).unlink()
    before = guidance.feature_file(third).read_bytes()
    done = extract("--train_data_dir", data, "--clip", clip)
    assert "3 images, 1 of them up to date" in done.stdout
    assert guidance.feature_file(third).read_bytes() == before
    guidance.load(dict.fromkeys(images_of(data), 1.0), "x")
    assert not list(data.rglob("*.part*"))


def test_an_image_has_the_features_of_what_is_trained(clip, data):
    """Transparent ones on white, as in the engine; what is hidden under the transparency does not count."""
    values = np.random.default_rng(1).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    Image.fromarray(values).save(data / "1_b" / "transparent.png")
    image_files.open_rgb(data / "1_b" / "transparent.png").save(data / "1_b" / "on_white.png")
    scan = (values[..., 0].astype(np.uint16) * 257) // 4
    Image.fromarray(scan).save(data / "1_b" / "deep.png")
    scene = {name: data / "1_b" / f"{name}.png" for name in ("transparent", "on_white", "deep")}
    Image.new("RGB", (8, 8)).save(data / "1_b" / "scan.tif")
    done = extract("--train_data_dir", data, "--clip", clip)
    assert "2 images, transparent: taken on white" in done.stdout
    assert "1 images, 16 bits per pixel: taken at its brightness" in done.stdout
    assert "1 images, left out, since trainers do not read their format; save them as PNG: 1_b/scan.tif" in done.stdout
    loaded = guidance.load(dict.fromkeys(scene.values(), 1.0), "x").by_image
    assert torch.equal(loaded[scene["transparent"]], loaded[scene["on_white"]])
    assert not torch.allclose(loaded[scene["deep"]], loaded[scene["on_white"]], atol=1e-3)


def test_a_kohya_toml_names_the_images(clip, data, tmp_path):
    (tmp_path / "my.toml").write_text(f'[data]\ntrain_data_dir = "{data.as_posix()}"\n[training]\nseed = 1\n')
    assert "3 images" in extract("--config_file", tmp_path / "my.toml", "--clip", clip).stdout


def test_broken_images_are_named_and_the_others_extracted(clip, data):
    (data / "2_a" / "broken.png").write_bytes(b"no image")
    whole = (data / "2_a" / "1.png").read_bytes()
    (data / "2_a" / "cut.png").write_bytes(whole[: len(whole) // 2])
    done = extract("--train_data_dir", data, "--clip", clip)
    assert done.returncode == 1
    assert "2 images cannot be read" in done.stdout
    assert "broken.png" in done.stdout
    assert "cut.png: damaged: image file is truncated" in done.stdout
    assert guidance.feature_file(data / "2_a" / "1.png").is_file()
    assert not guidance.feature_file(data / "2_a" / "broken.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--clip", "CLIP"], "none of train_data_dir, reg_data_dir, dataset_config, in_json is given"),
        (["--train_data_dir", "DATA", "--clip", "/nowhere"], "--clip /nowhere: "),
        (["--train_data_dir", "DATA", "--clip", "CLIP", "--batch_size", "0"], "--batch_size 0: expected"),
        (["--train_data_dir", "DATA", "--clip", "CLIP", "--device", "warp"], "--device warp: "),
        (["--train_data_dir", "DATA", "--clip", "CLIP", "--devise", "cpu"], "unrecognized arguments: --devise cpu"),
    ],
)
def test_errors_are_one_message(clip, data, arguments, words):
    given = [{"CLIP": clip, "DATA": data}.get(word, word) for word in arguments]
    done = extract(*given)
    assert done.returncode != 0
    assert words in done.stdout
    assert "Traceback" not in done.stdout
