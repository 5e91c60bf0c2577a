"""The engine's data: finding and reading noise_images, buckets, batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from freq_loss_plugin import ConfigError
from freq_loss_plugin.engine import dataset

# Warnings of diffusers, transformers and accelerate are not ours.
pytestmark = pytest.mark.filterwarnings("default")


def test_images_captions_and_repeats(make_settings):
    data = dataset.find(make_settings())
    repeats = [(example.file.parent.name, example.repeats) for example in data.examples]
    assert repeats == [("1_noise", 1)] * 5 + [("2_more", 2)]
    assert data.examples[3].caption == "noise, number 3"
    assert data.warnings == []
    assert data.tag_frequency["1_noise"] == {"noise": 5, **{f"number {i}": 1 for i in range(5)}}


def test_missing_captions_fall_back_to_the_folder_name_with_a_warning(make_settings, tmp_path):
    (tmp_path / "1_red cat").mkdir()
    (tmp_path / "notes").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "1_red cat" / "one.png")
    data = dataset.find(make_settings(train_data_dir=str(tmp_path)))
    assert data.examples[0].caption == "red cat"
    warnings = " ".join(data.warnings)
    for text in ("1_red cat/one.png", "*.txt", "notes"):
        assert text in warnings


def test_broken_images_are_refused_by_name(make_settings, tmp_path):
    folder = tmp_path / "1_mixed"
    folder.mkdir()
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.webp").touch()
    with pytest.raises(ConfigError) as caught:
        dataset.find(make_settings(train_data_dir=str(tmp_path)))
    for word in ("1_mixed/cut.png", "1_mixed/text.jpg", "1_mixed/empty.webp", "repair or remove"):
        assert word in str(caught.value)
    assert "good.png" not in str(caught.value)


def test_no_images_is_an_error_that_shows_the_layout(make_settings, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ConfigError, match=r"no images.*10_mycat.*found only 1 folders, ignored.*photos"):
        dataset.find(make_settings(train_data_dir=str(tmp_path)))


def test_pixels_cover_the_size_and_are_center_cropped(tmp_path):
    image = Image.new("RGB", (200, 100), (255, 0, 0))
    image.paste((0, 0, 255), (60, 0, 140, 100))
    image.save(tmp_path / "wide.png")
    pixels = dataset.load_pixels(dataset.Example(tmp_path / "wide.png", "", 1, (64, 64)))
    assert pixels.shape == (3, 64, 64)
    assert pixels[2, :, 10:-10].min() > 0.9
    assert pixels[0, :, :4].min() > 0.9


@pytest.mark.sd_scripts
@pytest.mark.parametrize("limits", [{}, {"min_bucket_reso": 300, "max_bucket_reso": 700}], ids=["default", "odd"])
def test_buckets_are_those_of_sd_scripts(make_settings, monkeypatch, limits):
    import hosts

    monkeypatch.syspath_prepend(str(hosts.sd_scripts()))
    from library.train_util import BaseDataset, BucketManager

    run_settings = make_settings(resolution="512,512", enable_bucket=True, **limits)
    step = run_settings.bucket_reso_steps
    adjusted = BaseDataset.adjust_min_max_bucket_reso_by_steps(
        None, run_settings.size, run_settings.min_bucket_reso, run_settings.max_bucket_reso, step
    )
    manager = BucketManager(False, run_settings.size, *adjusted, step)
    manager.make_buckets()
    generator = np.random.default_rng(0)
    for width, height in generator.integers(64, 3000, size=(300, 2)).tolist():
        theirs, _, error = manager.select_bucket(width, height)
        ours = dataset.bucket((width, height), run_settings)
        # Two buckets can be equally near.
        assert ours == theirs or abs(abs(ours[0] / ours[1] - width / height) - abs(error)) < 1e-9


def test_an_epoch_has_every_image_as_often_as_its_repeats():
    examples = [dataset.Example(Path(f"{i}"), "", 1 + i % 3, (64, 64 + 64 * (i % 2))) for i in range(20)]
    batches = dataset.Batches(examples, 4, seed=1)
    epoch = [batches[number] for number in range(batches.per_epoch)]
    indices = sorted(index for batch in epoch for index in batch)
    assert indices == sorted(index for index, example in enumerate(examples) for _ in range(example.repeats))
    assert all(len({examples[index].size for index in batch}) == 1 for batch in epoch)
    following = [batches[number] for number in range(batches.per_epoch, 2 * batches.per_epoch)]
    assert following != epoch
    assert [dataset.Batches(examples, 4, seed=1)[number] for number in range(batches.per_epoch)] == epoch
    assert [dataset.Batches(examples, 4, seed=2)[number] for number in range(batches.per_epoch)] != epoch
