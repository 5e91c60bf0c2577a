"""What is missing in images, by their spectrum; and compression that was hidden by saving an image again."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("statsmodels")

from PIL import Image

from benchmarks.image_quality import defects, found
from benchmarks.image_quality.__main__ import table
from freq_loss_plugin.image_quality import dead_leaves
from freq_loss_plugin.image_quality.measurement import MOTION, measure_image
from freq_loss_plugin.image_quality.sharpness import measure_sharpness

# They have the statistics of photographs, need no download, and are not clipped.
SCENES = [dead_leaves.draw(512, seed).point(lambda value: 40 + 0.68 * value) for seed in range(2)]
SCALES = {"2 times, bicubic": 2, "2 times, Lanczos": 2, "3 times": 3, "4 times, bicubic": 4, "4 times, Lanczos": 4}
SCALES |= {"4 times, nearest": 4, "4 times, JPEG 85": 4, "8 times": 8}


def made(name, number=0):
    return found.MAKES[name](SCENES[number], np.random.default_rng(number))


@pytest.mark.parametrize("name", defects.MISSING)
def test_missing_detail_is_found(name):
    for number in range(len(SCENES)):
        one = measure_image(made(name, number))
        assert one.defect.resolution < 1, one
        assert one.witness.startswith("pixels: " if "nearest" in name else "spectrum: -")


@pytest.mark.parametrize("name", SCALES)
def test_enlarged_images_have_the_resolution_that_they_had(name):
    for number in range(len(SCENES)):
        assert measure_image(made(f"enlarged {name}", number)).resolution == pytest.approx(1 / SCALES[name], rel=0.25)


@pytest.mark.parametrize("name", [name for name in defects.GOOD if name not in ("halftone", "6% in focus")])
def test_what_people_like_is_no_defect(name):
    for number in range(len(SCENES)):
        one = measure_image(made(name, number))
        assert not one.defect, one


def test_a_worse_blur_is_never_better():
    for make in (defects.gaussian, defects.disk):
        found = [measure_image(make(size)(SCENES[0], np.random.default_rng(0))) for size in (2, 4, 8, 16)]
        assert all(one.defect for one in found)
        resolutions = [one.resolution for one in found]
        assert all(worse <= 1.1 * better for better, worse in pairwise(resolutions))


@pytest.mark.parametrize("length", [15, 25])
def test_motion_is_told_from_a_blur(length):
    one = measure_image(defects.moved(length)(SCENES[0], np.random.default_rng(3)))
    assert one.notes == (MOTION,)
    assert "in one direction" in one.witness
    assert not measure_image(defects.gaussian(4)(SCENES[0], np.random.default_rng(3))).notes


@pytest.mark.parametrize("name", [name for name in defects.COMPRESSED if "resized" not in name])
def test_jpeg_is_found_after_it_was_saved_again(name):
    quality = int(name.split(",")[0].split()[1])
    assert measure_image(made(name)).jpeg == quality


def test_jpeg_that_was_resized_is_not_known():
    one = measure_image(Image.fromarray(np.asarray(made("JPEG 20, then PNG"))).resize((410, 410)))
    assert not one.is_known
    assert one.notes == ("resized by 0.80 after JPEG, of which the quality is not known",)


@pytest.mark.parametrize("name", [*defects.FOOLING, *defects.NOT_FOOLED])
def test_covers_do_not_change_the_verdict(name):
    one = measure_image(made(name))
    assert (one.defect.resolution < 0.4) == (name in defects.FOOLING), one


def test_pixel_art_is_not_called_enlarged():
    cells = np.random.default_rng(0).integers(0, 12, (64, 64))
    palette = np.random.default_rng(1).integers(0, 255, (12, 3), dtype=np.uint8)
    art = Image.fromarray(palette[cells]).resize((512, 512), Image.Resampling.NEAREST)
    assert not measure_image(art).defect


def test_small_images_and_those_of_one_color_say_nothing():
    assert measure_sharpness(SCENES[0].resize((128, 128))).resolution is None
    assert measure_sharpness(Image.new("RGB", (512, 512), "red")).resolution is None


def test_the_benchmark_writes_a_table(tmp_path):
    SCENES[0].save(tmp_path / "scene.png")
    good = [found.measure(name, tmp_path / "scene.png") for name in ("sharp", "fog")]
    bad = [found.measure("enlarged 4 times, bicubic", tmp_path / "scene.png")]
    by_name = {name: bad if name.startswith("enlarged") else good for name in found.MAKES}
    lines = table(by_name, good, [tmp_path]).splitlines()
    (row,) = [line for line in lines if line.startswith("| enlarged 4 times, bicubic")]
    assert row.startswith("| enlarged 4 times, bicubic | 1.00 (0.21 to 1.00) | 0.00")
    assert row.endswith("| 1.00 (0.21 to 1.00) |")
    (row,) = [line for line in lines if line.startswith("| sharp")]
    assert row.startswith("| sharp | 0.00 (0.00 to 0.66) |")
