"""The size at which an image is trained: against the programs' own code, and by what ``inspect`` measures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from freq_loss_plugin import ConfigError
from freq_loss_plugin.__main__ import main
from freq_loss_plugin.image_quality.sizes import read_buckets

# The hosts' own warnings are none of this project's business.
pytestmark = pytest.mark.filterwarnings("default")

SIZES = [(512, 512), (1024, 1024), (448, 576), (1, 900), (900, 1)]
SIZES += [tuple(sides) for sides in np.random.default_rng(0).integers(64, 3000, size=(400, 2)).tolist()]
OPTIONS = {
    "no buckets": {"resolution": "512,768"},
    "buckets": {"resolution": 512, "enable_bucket": True},
    "odd limits": {"resolution": [512, 512], "enable_bucket": True, "min_bucket_reso": 300, "max_bucket_reso": 700},
    "steps": {"resolution": "768", "enable_bucket": True, "bucket_reso_steps": 32},
    "not enlarged": {"resolution": "512,512", "enable_bucket": True, "bucket_no_upscale": True},
    "no buckets, so enlarged": {"resolution": "512,512", "enable_bucket": False, "bucket_no_upscale": True},
}


@pytest.mark.sd_scripts
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sizes_are_those_of_sd_scripts(monkeypatch, options):
    import hosts

    monkeypatch.syspath_prepend(str(hosts.sd_scripts()))
    from library.train_util import BaseDataset, BucketManager

    buckets, step = read_buckets(options), options.get("bucket_reso_steps", 64)
    if options.get("enable_bucket"):
        given = options.get("min_bucket_reso", 256), options.get("max_bucket_reso", 1024)
        limits = BaseDataset.adjust_min_max_bucket_reso_by_steps(None, buckets.resolution, *given, step)
        manager = BucketManager(options.get("bucket_no_upscale", False), buckets.resolution, *limits, step)
        if not manager.no_upscale:
            manager.make_buckets()
    else:
        manager = BucketManager(False, buckets.resolution, None, None, None)
        manager.set_predefined_resos([buckets.resolution])
    sizes = [size for size in SIZES if min(size) >= 64] if options.get("bucket_no_upscale") else SIZES
    for size in sizes:
        try:
            bucket, resized, _ = manager.select_bucket(*size)
        except AssertionError:
            continue  # a strip, whose shape sd-scripts does not accept
        assert (buckets.bucket(size), buckets.resized(size)) == (bucket, resized), size


@pytest.mark.musubi_tuner
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sizes_are_those_of_musubi_tuner(options):
    import hosts

    hosts.musubi_tuner()
    from musubi_tuner.dataset.image_video_dataset import BucketSelector

    buckets = read_buckets(options, "musubi-tuner")
    flags = options.get("enable_bucket", False), options.get("bucket_no_upscale", False)
    selector = BucketSelector(buckets.resolution, *flags, "qi")
    for size in SIZES:
        if min(size) >= 64:
            assert buckets.bucket(size) == tuple(selector.get_bucket_resolution(size)), size


@pytest.mark.musubi_tuner
@pytest.mark.parametrize("size", SIZES[:3] + SIZES[5:12])
def test_what_is_cropped_was_resized_as_in_musubi_tuner(monkeypatch, size):
    import hosts

    hosts.musubi_tuner()
    from musubi_tuner.dataset import image_video_dataset

    buckets = read_buckets({"resolution": 512, "enable_bucket": True, "bucket_no_upscale": True}, "musubi-tuner")
    resized = []
    for owner, name in ((Image.Image, "resize"), (image_video_dataset.cv2, "resize")):
        method = getattr(owner, name)

        def recording(image, size, *arguments, method=method, **named):
            resized.append(tuple(size))
            return method(image, size, *arguments, **named)

        monkeypatch.setattr(owner, name, recording)
    image_video_dataset.resize_image_to_bucket(Image.new("RGB", size), buckets.bucket(size))
    assert (resized or [size])[-1] == buckets.resized(size)


# -- what inspect measures -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One image of 300 × 200 pixels, in a folder of its own."""
    folder = tmp_path_factory.mktemp("data") / "1_x"
    folder.mkdir()
    Image.effect_noise((300, 200), 80).convert("RGB").save(folder / "image.png")
    (folder / "image.txt").touch()
    return folder


def measured(tmp_path, *arguments):
    file = tmp_path / "report.json"
    assert main(["inspect", *map(str, arguments), "--json", str(file)]) == 0
    (image,) = json.loads(file.read_text(encoding="utf-8"))["images"]
    return image["trained_width"], image["trained_height"]


RUNS = {
    "no buckets": ("resolution = 512\nenable_bucket = false", (768, 512)),
    "the default is none": ("resolution = 512", (768, 512)),
    "buckets": ('resolution = "512,512"\nenable_bucket = true', (640, 427)),
    "not enlarged": ("resolution = 512\nenable_bucket = true\nbucket_no_upscale = true", (300, 200)),
    "none": ("", (300, 200)),
}


@pytest.mark.parametrize(("options", "expected"), RUNS.values(), ids=RUNS)
def test_inspect_measures_at_the_size_of_the_run(folder, tmp_path, options, expected):
    file = tmp_path / "run.toml"
    file.write_text(f"{options}\n[data]\ntrain_data_dir = {str(folder.parent)!r}\n", encoding="utf-8")
    assert measured(tmp_path, "--config_file", file) == expected


def test_inspect_is_told_on_the_command_line(folder, tmp_path):
    given = ("--train_data_dir", folder.parent, "--resolution", "512")
    assert measured(tmp_path, *given) == (768, 512)
    assert measured(tmp_path, *given, "--enable_bucket") == (640, 427)
    assert measured(tmp_path, *given, "--enable_bucket", "--bucket_no_upscale") == (300, 200)


SUBSET = "[[datasets.subsets]]\nimage_dir = 'FOLDER'\n"
DATASETS = {
    "its own": (f"[[datasets]]\nresolution = 512\n{SUBSET}", (768, 512)),
    "of all": (f"[general]\nresolution = 512\nenable_bucket = true\n[[datasets]]\n{SUBSET}", (640, 427)),
    "its own first": (f"[general]\nresolution = 1024\n[[datasets]]\nresolution = [512, 256]\n{SUBSET}", (512, 341)),
    "the run's": (f"[[datasets]]\n{SUBSET}", (384, 256)),
    "two": (f"[[datasets]]\nresolution = 256\n{SUBSET}[[datasets]]\nresolution = 512\n{SUBSET}", (768, 512)),
    "musubi": ("[[datasets]]\nresolution = 512\nimage_directory = 'FOLDER'\n", (768, 512)),
    "musubi, buckets": (
        "[general]\nresolution = 512\nenable_bucket = true\n[[datasets]]\nimage_directory = 'FOLDER'\n",
        (624, 416),
    ),
    "musubi's default": ("[[datasets]]\nimage_directory = 'FOLDER'\n", (960, 640)),
}


@pytest.mark.parametrize(("config", "expected"), DATASETS.values(), ids=DATASETS)
def test_inspect_measures_at_the_size_of_the_data_set(folder, tmp_path, config, expected):
    file = tmp_path / "data.toml"
    file.write_text(config.replace("FOLDER", str(folder)), encoding="utf-8")
    assert measured(tmp_path, "--dataset_config", file, "--resolution", "256") == expected


WRONG = {
    "resolution": {"resolution": "big"},
    "small": {"resolution": 32},
    "three": {"resolution": [512, 512, 512]},
    "step": {"resolution": 512, "bucket_reso_steps": 0},
    "limit": {"resolution": 512, "max_bucket_reso": "large"},
}


@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG)
def test_invalid_values_are_errors(options):
    with pytest.raises(ConfigError, match="expected "):
        read_buckets(options)


def test_a_panorama_too_narrow_for_any_bucket_is_one_step_high():
    """sd-scripts itself cannot make a bucket for it; `inspect` still looks at the other images."""
    buckets = read_buckets({"resolution": 512, "enable_bucket": True, "bucket_no_upscale": True}, "sd-scripts")
    for image in ((6000, 64), (64, 6000)):
        assert min(buckets.resized(image)) > 0
        assert min(buckets.bucket(image)) == 64
