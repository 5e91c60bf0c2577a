"""``python -m freq_loss_plugin inspect``: what it prints, what it writes, and the page in a browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import bad_images
import pytest
from bad_images import compressed, enlarged, noisy, scene
from PIL import Image

from freq_loss_plugin.__main__ import main
from freq_loss_plugin.image_quality.measurement import measure_file
from freq_loss_plugin.image_quality.published import lookup

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six sharp scenes, and one of each kind that is not; one name would be HTML."""
    folder = tmp_path_factory.mktemp("images")
    bad_images.write(folder / "data" / "1_sharp", [scene(number) for number in range(6)])
    bad = folder / "data" / "3_bad"
    bad.mkdir()
    enlarged(scene(11), 8).save(bad / "enlarged.png")
    compressed(scene(12), 10).save(bad / "<i>saved again.png")
    noisy(scene(13), 20).save(bad / "noisy.png")
    scene(14).save(bad / "compressed.jpg", quality=20)
    Image.new("RGB", (128, 128), "red").save(bad / "red.png")
    return folder / "data"


def inspect(*arguments):
    return main(["inspect", *map(str, arguments)])


def test_the_table_has_the_worst_first(images, capsys):
    before = sorted(images.rglob("*"))
    assert inspect("--train_data_dir", images) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["image", "size", "resolution", "JPEG", "noise", "restored", "t", "remark"]
    assert all(line.startswith("3_bad/") for line in lines[2:6])
    assert "11 images: 6 full quality, 1 blurred or enlarged, 2 JPEG below quality 70, 1 noisy, 1 not known" in lines
    assert any("one color: nothing to measure, taken as good" in line for line in lines)
    assert any("restores the latents of the 4 bad images with a filter, which takes back" in line for line in lines)
    later = re.compile(r"4 of 11 images no longer train below t = \d+ to \d+ \(of 1000\), the others at every t\.")
    assert any(map(later.fullmatch, lines))
    assert any("are those of SDXL (--model chooses others), from a table" in line for line in lines)
    assert sorted(images.rglob("*")) == before  # nothing is written


def test_the_json_has_every_image(images, tmp_path, capsys):
    assert inspect("--train_data_dir", images, "--json", tmp_path / "a" / "report.json") == 0
    assert f"wrote {tmp_path / 'a' / 'report.json'}" in capsys.readouterr().out
    report = json.loads((tmp_path / "a" / "report.json").read_text(encoding="utf-8"))
    found = {image["file"].rpartition("/")[2]: image for image in report["images"] if "3_bad" in image["file"]}
    assert len(report["images"]) == 11
    assert found["enlarged.png"]["effective_resolution"] == pytest.approx(1 / 8, rel=0.3)
    assert report["model"] == "sdxl"
    for image in found.values():
        defect = measure_file(Path(image["file"])).defect
        assert (image["restored"] or 0, image["least_timestep"]) == lookup("sdxl", defect)
    assert 0.2 < found["enlarged.png"]["restored"] < 0.8
    assert 300 < found["enlarged.png"]["least_timestep"] < 900
    assert found["<i>saved again.png"]["jpeg_quality"] == 10
    assert found["compressed.jpg"]["jpeg_quality"] == 20
    assert found["noisy.png"]["noise"] == pytest.approx(20, rel=0.2)
    assert found["red.png"]["least_timestep"] == 0
    sharp = [image for image in report["images"] if "1_sharp" in image["file"]]
    assert {(image["restored"], image["least_timestep"]) for image in sharp} == {(None, 0)}
    assert {(image["width"], image["trained_width"]) for image in sharp} == {(128, 128)}


def test_the_resolution_of_the_training_counts(images, tmp_path, capsys):
    """Trained at four times their size, the sharp ones are blurred, too; the blurred one at a quarter is sharp."""
    file = tmp_path / "report.json"
    assert inspect("--train_data_dir", images / "1_sharp", "--resolution", "512", "--json", file) == 0
    report = json.loads(file.read_text(encoding="utf-8"))
    assert {image["trained_width"] for image in report["images"]} == {512}
    assert max(image["effective_resolution"] for image in report["images"]) <= 0.3
    assert "No image is known to be of full quality, so there is nothing to compare with" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["config_file", "dataset_config", "folder"])
def test_the_images_of_a_run_by_its_own_files(images, tmp_path, capsys, kind):
    (tmp_path / "run.toml").write_text(
        f'[data]\ntrain_data_dir = "{images}"\nresolution = "128,128"\n[freq_loss]\ndist_match = 0\n', encoding="utf-8"
    )
    subsets = "".join(f'[[datasets.subsets]]\nimage_dir = "{folder}"\n' for folder in images.iterdir())
    (tmp_path / "data.toml").write_text(f"[[datasets]]\n{subsets}", encoding="utf-8")
    arguments = {
        "config_file": ("--config_file", tmp_path / "run.toml"),
        "dataset_config": ("--dataset_config", tmp_path / "data.toml"),
        "folder": ("--train_data_dir", images / "3_bad"),
    }
    assert inspect(*arguments[kind]) == 0
    assert f"{5 if kind == 'folder' else 11} images: " in capsys.readouterr().out


def test_a_set_without_defects_needs_nothing(images, capsys):
    assert inspect("--train_data_dir", images / "1_sharp") == 0
    out = capsys.readouterr().out
    assert "6 images: 6 full quality" in out
    assert "Nothing to do: all are of full quality." in out
    assert "SDXL" not in out


def test_unreadable_images_are_named(images, tmp_path, capsys):
    shutil.copytree(images / "1_sharp", tmp_path / "1_x")
    (tmp_path / "1_x" / "broken.png").write_bytes(b"no image")
    assert inspect("--train_data_dir", tmp_path, "--json", tmp_path / "report.json") == 1
    out = capsys.readouterr().out
    assert "broken.png" in out
    assert "no image, or of a format that Pillow cannot read" in out
    assert "1 images cannot be read, for the reason beside them, and trainers stop there: repair or remove" in out
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert "error" in report["images"][0]


WRONG = {
    "nothing": ((), "no images: none of train_data_dir"),
    "folder": (("--train_data_dir", "nowhere"), "there is no such folder"),
    "toml": (("--config_file", "nowhere.toml"), "nowhere.toml: there is no such file"),
    "resolution": (("--train_data_dir", "IMAGES", "--resolution", "big"), "expected a side like 1024"),
    "small": (("--train_data_dir", "IMAGES", "--resolution", "32"), "of at least 64"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_used_is_an_error(images, capsys, arguments, message):
    assert inspect(*(images if argument == "IMAGES" else argument for argument in arguments)) == 1
    assert message in capsys.readouterr().err


def test_the_plot_is_written(images, tmp_path):
    assert inspect("--train_data_dir", images, "--plot", tmp_path / "plot.png") == 0
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.size == (700, 420)


@pytest.fixture(scope="module")
def page(images, tmp_path_factory):
    """The page in a browser, and what went wrong in it."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium")
    file = tmp_path_factory.mktemp("page") / "report.html"
    assert inspect("--train_data_dir", images, "--html", file) == 0
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, troubles = browser.new_page(), []
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: troubles.append(request.url) if request.url.startswith("http") else None)
        page.goto(file.as_uri())
        yield page, troubles
        browser.close()


def test_the_page_shows_every_image_and_needs_nothing_else(page):
    page, troubles = page
    assert page.locator("tbody tr").count() == 11
    assert page.locator("tbody tr.bad").count() == 4
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert page.locator("tbody svg polyline.measured").count() == 11
    assert page.locator("figure").count() == 4
    assert page.get_by_text("<i>saved again.png").count() == 2
    assert troubles == []


def test_a_click_on_a_heading_sorts(page):
    page, troubles = page

    def column(number):
        return page.locator(f"tbody td:nth-child({number})").all_inner_texts()

    page.get_by_role("button", name="noise").click()
    noises = [float(cell) for cell in column(6)]
    assert noises == sorted(noises)
    page.get_by_role("button", name="noise").click()
    assert [float(cell) for cell in column(6)] == sorted(noises, reverse=True)
    assert page.locator('th[aria-sort="descending"]').inner_text().startswith("noise")
    page.get_by_role("button", name="image").click()
    names = column(2)
    assert names[0].startswith("1_sharp")
    assert names[-1].startswith("3_bad")
    assert page.locator("th[aria-sort=descending]").count() == 0
    assert troubles == []
