"""Which images ``inspect`` finds in folders and dataset configs, and what it says of all else that is there."""

from __future__ import annotations

import json
from pathlib import Path, PureWindowsPath

import bad_images
import pytest
from bad_images import enlarged, scene
from PIL import Image

from freq_loss_plugin import ConfigError, image_files, image_folders
from freq_loss_plugin.__main__ import main
from freq_loss_plugin.inspection import findings


@pytest.fixture
def data(tmp_path):
    """A ``train_data_dir`` with an image and a folder that are not trained, and one of regularization images."""
    bad_images.write(tmp_path / "data" / "2_cat", [scene(number) for number in range(2)])
    bad_images.write(tmp_path / "data" / "notes", [scene(2)])
    bad_images.write(tmp_path / "reg" / "1_person", [scene(3)])
    scene(4).save(tmp_path / "data" / "cover.png")
    return tmp_path / "data"


def inspect(capsys, *arguments):
    """Exit status, images by name as the JSON has them, and what is printed."""
    file = Path(arguments[1]).parent / "report.json"
    file.unlink(missing_ok=True)
    status = main(["inspect", *map(str, arguments), "--json", str(file)])
    printed = capsys.readouterr()
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"images": []}
    return status, {Path(image["file"]).name: image for image in report["images"]}, printed.out + printed.err


# -- folders -----------------------------------------------------------------------------------------------------------


def test_folders_with_repeats_win_over_images_beside_them(data, capsys):
    status, images, out = inspect(capsys, "--train_data_dir", data)
    assert status == 0
    assert sorted(images) == ["00.png", "01.png"]
    assert "1 images, not trained, since they are in no folder like 10_mycat: data/cover.png" in out
    assert "1 folders, ignored, since their names do not begin with a number of repeats, like 10_mycat: data/not" in out


def test_regularization_images_count_beside_a_folder_of_images(data, tmp_path, capsys):
    _, images, _ = inspect(capsys, "--train_data_dir", data / "notes", "--reg_data_dir", tmp_path / "reg")
    assert len(images) == 1  # both are called 00.png
    found = image_folders.find(str(data / "notes"), str(tmp_path / "reg"), or_directly=True)
    assert found.images == [data / "notes" / "00.png", tmp_path / "reg" / "1_person" / "00.png"]
    found = image_folders.find(str(data), str(tmp_path / "reg" / "1_person"), or_directly=True)
    assert [image.parent.name for image in found.images] == ["2_cat", "2_cat", "1_person"]


def test_a_run_has_no_images_outside_of_folders_with_repeats(data):
    with pytest.raises(ConfigError, match=r"no images: .*; found only 1 images, not trained.*notes/00\.png"):
        image_folders.find(str(data / "notes"))


def test_formats_that_trainers_do_not_read_are_named(data, capsys):
    folder = data / "2_cat"
    for name in ("a.tif", "b.GIF", "c.jfif"):
        scene(5).save(folder / name, {"jfif": "JPEG"}.get(name[2:]))
    (folder / "IMG_0001.HEIC").write_bytes(b"from a phone")
    for arguments in (("--train_data_dir", data), ("--train_data_dir", folder)):
        _, images, out = inspect(capsys, *arguments)
        assert sorted(images) == ["00.png", "01.png"]
        assert "4 images, left out, since trainers do not read their format; save them as PNG: 2_cat/IMG_0001" in out
        for name in ("a.tif", "b.GIF", "c.jfif"):
            assert f"2_cat/{name}" in out


def test_where_there_are_others_alone_they_are_named(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.heic").write_bytes(b"from a phone")
    status, _, out = inspect(capsys, "--train_data_dir", tmp_path / "photos")
    assert status == 1
    assert "found only 1 images, left out" in out
    assert "photos/a.heic" in out


# -- musubi-tuner ------------------------------------------------------------------------------------------------------


@pytest.fixture
def videos(tmp_path):
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "b.MOV", "notes.txt"):
        (tmp_path / "clips" / name).write_bytes(b"a video")
    return tmp_path / "clips"


def written(file, text):
    file.write_text(text, encoding="utf-8")
    return file


def test_images_and_videos_of_musubi_tuner(data, videos, tmp_path, capsys):
    (data / "2_cat" / "01.txt").unlink()
    scene(5).save(data / "2_cat" / "a.tif")
    config = (
        "[general]\nresolution = [128, 128]\ncaption_extension = '.txt'\n"
        f"[[datasets]]\nimage_directory = '{data / '2_cat'}'\n[[datasets]]\nvideo_directory = '{videos}'\n"
    )
    status, images, out = inspect(capsys, "--dataset_config", written(tmp_path / "musubi.toml", config))
    assert status == 0
    assert sorted(images) == ["00.png"]
    assert "1 images, left out by musubi-tuner, since they have no caption file: 2_cat/01.png" in out
    assert "1 images, left out, since trainers do not read their format; save them as PNG: 2_cat/a.tif" in out
    assert "2 videos, not looked at; a run with freq_loss_image_quality measures" in out
    assert "clips/a.mp4, clips/b.MOV" in out
    without = config.replace("caption_extension = '.txt'\n", "")
    _, images, _ = inspect(capsys, "--dataset_config", written(tmp_path / "musubi.toml", without))
    assert sorted(images) == ["00.png", "01.png"]


def test_lists_of_musubi_tuner(data, videos, tmp_path, capsys):
    scene(5).save(tmp_path / "scan.tif")  # what is listed is read whatever its ending
    images = [{"image_path": str(data / "2_cat" / "00.png"), "caption": "a"}]
    images += [{"image_path_0": str(data / "cover.png"), "image_path_1": str(tmp_path / "scan.tif"), "caption": "b"}]
    written(tmp_path / "images.jsonl", "\n".join(map(json.dumps, images)))
    written(tmp_path / "videos.jsonl", json.dumps({"video_path": str(videos / "a.mp4"), "caption": "c"}) + "\n\n")
    config = {
        "datasets": [
            {"image_jsonl_file": str(tmp_path / "images.jsonl")},
            {"video_jsonl_file": str(tmp_path / "videos.jsonl")},
        ]
    }
    _, found, out = inspect(capsys, "--dataset_config", written(tmp_path / "musubi.json", json.dumps(config)))
    assert sorted(found) == ["00.png", "cover.png", "scan.tif"]
    assert "1 videos, not looked at" in out


WRONG = {
    "videos alone": ("[[datasets]]\nvideo_directory = 'clips'", "found only 2 videos, not looked at"),
    "a missing folder": ("[[datasets]]\nimage_directory = 'nowhere'", "image_directory = 'nowhere': there is no such"),
    "no folder": ("[[datasets]]\nimage_dir = 'clips'", "number 1 of its [[datasets]] names no images. Expected"),
    "single brackets": ("[datasets]\nimage_directory = 'clips'", "expected [[datasets]], with double brackets"),
    "a list without paths": ("[[datasets]]\nimage_jsonl_file = 'a.jsonl'", "'a.jsonl' has a line without image_path"),
}


@pytest.mark.parametrize(("config", "words"), WRONG.values(), ids=WRONG)
def test_why_there_are_no_images(videos, tmp_path, monkeypatch, capsys, config, words):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.jsonl", '{"file": "clips/a.png"}')
    status, _, out = inspect(capsys, "--dataset_config", written(tmp_path / "musubi.toml", config))
    assert status == 1
    assert words in out


# -- files that cannot be read -----------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path):
    """An image, and one of each kind that is none; with what is said of it."""
    folder = bad_images.write(tmp_path / "data" / "1_x", [scene(0)])
    whole = (folder / "00.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    (folder / "text.png").write_text("hello", encoding="utf-8")
    (folder / "link.png").symlink_to("nowhere.png")
    Image.new("L", (14000, 13000)).save(folder / "huge.jpg")
    said = {
        "cut.png": "damaged: image file is truncated",
        "empty.png": "an empty file",
        "folder.png": "a folder, not a file",
        "text.png": "no image, or of a format that Pillow cannot read",
        "link.png": "a link to a file that is not there",
        "huge.jpg": "save it smaller; Image size (182000000 pixels) exceeds limit of 178956970 pixels",
    }
    return folder.parent, said


def test_every_file_that_cannot_be_read_has_its_reason(broken, capsys):
    folder, said = broken
    status, images, _ = inspect(capsys, "--train_data_dir", folder)
    assert status == 1
    for name, words in said.items():
        assert words in images[name]["error"]
        assert images[name]["quality"] == "not readable"
    assert images["00.png"]["quality"] == "full quality"


def test_the_engine_says_the_same(broken, make_settings):
    from freq_loss_plugin.engine import dataset

    folder, said = broken
    with pytest.raises(ConfigError, match="6 images cannot be read: ") as caught:
        dataset.find(make_settings(train_data_dir=str(folder)))
    for name, words in said.items():
        assert f"1_x/{name} (" in str(caught.value)
        assert words in str(caught.value)


def test_a_file_without_permission(tmp_path):
    scene(0).save(tmp_path / "a.png")
    assert "no permission" in image_files.why_unreadable(tmp_path / "a.png", PermissionError(13, "denied"))


# -- what is not known -------------------------------------------------------------------------------------------------


def unknown_images():
    """One image of each kind of which nothing can be said, by name."""
    faint = Image.new("RGB", (128, 128), (100, 100, 100))
    faint.paste((110, 110, 110), (40, 40, 90, 90))
    return {
        "one color": Image.new("RGB", (128, 128), "red"),
        "too few edges": faint,
        "pixels are too few": scene(1).crop((0, 0, 40, 40)),
    }


def test_what_is_not_known_is_counted_apart(tmp_path, capsys):
    folder = bad_images.write(tmp_path / "1_x", [scene(0), *unknown_images().values()])
    status, images, out = inspect(capsys, "--train_data_dir", tmp_path)
    assert status == 0
    assert "4 images: 1 full quality, 3 not known" in out
    assert "Nothing to do" not in out
    assert "Of 3 images the quality is not known" in out
    for number, words in enumerate(unknown_images(), 1):
        image = images[f"{number:02}.png"]
        assert image["quality"] == "not known"
        assert image["effective_resolution"] is None
        assert image["least_timestep"] == 0  # it trains everywhere
        assert words in image["notes"][-1]
    assert images["00.png"]["quality"] == "full quality"
    main(["inspect", "--train_data_dir", str(folder), "--html", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('<tr class="unknown">') == 3
    assert page.count('<tr class="good">') == 1
    assert "3 not known" in page


def test_without_any_that_is_known_to_be_good(tmp_path, capsys):
    bad_images.write(tmp_path / "1_x", [Image.new("RGB", (128, 128), "red"), enlarged(scene(0), 8)])
    _, _, out = inspect(capsys, "--train_data_dir", tmp_path)
    assert "2 images: 1 blurred or enlarged, 1 not known" in out
    assert "No image is known to be of full quality" in out


def test_a_photo_that_is_stored_rotated_is_something_to_do(tmp_path, capsys):
    folder = bad_images.write(tmp_path / "1_x", [scene(0)])
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(1).save(folder / "photo.jpg", exif=exif, quality=95)
    _, images, out = inspect(capsys, "--train_data_dir", tmp_path)
    assert images["photo.jpg"]["quality"] == "full quality"
    assert f"1 images are {image_files.ROTATED}." in out
    assert "Nothing to do" not in out


WRONG_SHAPES = {
    "subsets.toml": ('[[datasets]]\n[datasets.subsets]\nimage_dir = "x"\n', r"expected \[\[datasets.subsets\]\]"),
    "text.toml": ('[[datasets]]\nsubsets = "x"\n', r"expected \[\[datasets.subsets\]\]"),
    "general.toml": ("general = [1]\n[[datasets]]\n", r"expected \[general\] and \[\[datasets\]\]"),
    "list.json": ("[1, 2]", r"expected \[general\] and \[\[datasets\]\]"),
}


@pytest.mark.parametrize(("name", "case"), WRONG_SHAPES.items(), ids=WRONG_SHAPES)
def test_a_dataset_config_of_another_shape_is_an_error(tmp_path, name, case):
    text, message = case
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        image_folders.find(dataset_config=str(tmp_path / name))


def test_a_link_in_a_circle_is_an_image_that_cannot_be_read(tmp_path, capsys):
    folder = bad_images.write(tmp_path / "1_cat", [bad_images.scene(1)])
    (folder / "loop.png").symlink_to("loop.png")
    assert main(["inspect", "--train_data_dir", str(tmp_path)]) == 1
    assert "1 not readable" in capsys.readouterr().out


def test_images_on_several_drives_have_no_common_folder():
    one, near, far = map(PureWindowsPath, ("C:/a/1.png", "C:/b/2.png", "D:/b/2.png"))
    assert findings._common_folder([one, near]) == PureWindowsPath("C:/")
    assert findings._common_folder([one, far]) is None
