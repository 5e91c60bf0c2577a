"""What is known of the images of real data sets: one folder at two sizes, and caches of earlier images."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import bad_images
import pytest
from bad_images import enlarged, scene

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.image_quality import dead_leaves
from freq_loss_plugin.image_quality.pixels import as_pixels
from freq_loss_plugin.toy_model import model_folder
from kohya_patch.protocols import IMAGES

# The hosts' own warnings are none of this project's business.
pytestmark = pytest.mark.filterwarnings("default")

AUTO = FreqLossConfig(dist_match=0.0, image_quality="auto")


@pytest.fixture
def images(tmp_path):
    """Sharp images, and ones that were enlarged fourfold: at half their size, these lack less."""
    bad_images.write(tmp_path / "1_sharp", [scene(number) for number in range(3)])
    bad_images.write(tmp_path / "1_bad", [enlarged(scene(number), 4) for number in range(10, 13)])
    return tmp_path


def sd_scripts_run(stand_ins, images):
    """A run of sd-scripts whose data sets train these images at 128 and at 64 pixels."""
    from library import config_util

    from kohya_patch.sd_scripts.trainers import TrainingRun

    stand_in = stand_ins.make("sd15", train_batch_size=2)
    stand_in.trainer.vae_scale_factor = 0.18215
    subsets = [{"image_dir": str(folder), "caption_extension": ".txt"} for folder in sorted(images.glob("1_*"))]
    datasets = [{"resolution": side, "batch_size": 2, "subsets": subsets} for side in (128, 64)]
    generator = config_util.BlueprintGenerator(config_util.ConfigSanitizer(True, True, False, True))
    blueprint = generator.generate({"datasets": datasets}, stand_in.args)
    group, _ = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
    return TrainingRun(stand_in.trainer, stand_in.args, tuple(group.datasets))


def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(model_folder(), subfolder="vae")


def least_by_folder(quality, dataset):
    """The least timesteps of the images of all batches of a data set."""
    from kohya_patch.sd_scripts.image_names import _names_of

    found = {"1_sharp": set(), "1_bad": set()}
    for index in range(len(dataset.buckets_indices)):
        names = _names_of(dataset, index)
        least = quality.least_of({IMAGES: names})
        for place, name in enumerate(names):
            found[Path(name).parent.name].add(0 if least is None else int(least[place]))
    return found


@pytest.mark.sd_scripts
def test_one_folder_at_two_sizes_has_two_least_timesteps(stand_ins, images):
    from kohya_patch.sd_scripts.image_quality import make_quality

    run = sd_scripts_run(stand_ins, images)
    quality = make_quality(run, AUTO, vae())
    large, small = (least_by_folder(quality, dataset) for dataset in run.datasets)
    assert large["1_sharp"] == small["1_sharp"] == {0}
    assert min(large["1_bad"]) > max(small["1_bad"])
    assert quality.survey.summary.startswith("6 images at several sizes, 12 in all: ")
    assert not quality.survey.warnings


@pytest.mark.sd_scripts
def test_caches_of_earlier_images_are_named(stand_ins, images):
    from kohya_patch.sd_scripts.image_quality import make_quality

    run = sd_scripts_run(stand_ins, images)
    for dataset in run.datasets:
        for info in dataset.image_data.values():
            cache = Path(info.absolute_path).with_suffix(".npz")
            cache.touch()
            info.latents_npz = str(cache)
    image = images / "1_bad" / "01.png"
    scene(1).save(image)
    os.utime(image, (2e9, 2e9))
    (warning,) = make_quality(run, AUTO, vae()).survey.warnings
    assert warning.startswith("1 images are newer than their cached latents")
    assert "01.npz (of 01.png)" in warning
    assert "00.npz" not in warning


class Source:
    """A data source of musubi-tuner that has images and one video."""

    def __init__(self, images):
        self.image_paths = [str(image) for image in images]

    def get_video_data_from_path(self, path, first, end):
        assert (Path(path).name, end - first) == ("clip.mp4", 1)
        return [enlarged(scene(first), 8)]


def item(cache, key, size, bucket, frames=None):
    return argparse.Namespace(
        latent_cache_path=str(cache), item_key=key, original_size=size, bucket_size=bucket, frame_count=frames
    )


def musubi_dataset(images, cache, bucket):
    """A data set of musubi-tuner whose latents were cached at one size."""
    files = [*sorted(images.glob("1_sharp/*.png")), images / "1_bad" / "10.png", images / "clip.mp4"]
    items = []
    for file in files:
        is_clip = file.suffix == ".mp4"
        name = f"{file.stem}_{'00004-009_' if is_clip else ''}0128x0128_wan.safetensors"
        (cache / name).touch()
        items.append(item(cache / name, file.stem, (128, 128), bucket, 9 if is_clip else None))
    manager = argparse.Namespace(buckets={bucket: items}, bucket_batch_indices=[(bucket, 0)], batch_size=9)
    return argparse.Namespace(batch_manager=manager, datasource=Source(files))


@pytest.fixture
def musubi_run(images, tmp_path, monkeypatch):
    """A run of musubi-tuner at two sizes, with the toy model's VAE in place of its own."""
    import hosts

    hosts.musubi_tuner()
    import torch

    from kohya_patch.musubi import image_quality

    network, encoder = vae(), image_quality._Encoder

    @torch.no_grad()
    def encode(self, image):
        return network.encode(as_pixels(image)[None] * 2 - 1).latent_dist.mean[0] * network.config.scaling_factor

    monkeypatch.setattr(encoder, "__init__", lambda self, run, folder: None)
    monkeypatch.setattr(encoder, "encode", encode)
    monkeypatch.setattr(image_quality.image_names, "add_to", lambda datasets: None)
    enlarged(scene(10), 4).save(images / "1_bad" / "10.png")
    (images / "clip.mp4").touch()
    datasets = []
    for side in (128, 64):
        cache = tmp_path / f"cache {side}"
        cache.mkdir()
        datasets.append(musubi_dataset(images, cache, (side, side)))
    family = argparse.Namespace(prediction_type=lambda args: "flow")
    return argparse.Namespace(datasets=datasets, family=family, args=argparse.Namespace(max_timestep=None))


@pytest.mark.musubi_tuner
def test_items_of_musubi_tuner_have_the_least_timesteps_of_their_size(musubi_run):
    from kohya_patch.musubi.image_quality import make_quality

    quality = make_quality(musubi_run, AUTO)
    found = []
    for dataset in musubi_run.datasets:
        ((items,),) = [dataset.batch_manager.buckets.values()]
        found.append(quality.least_of({IMAGES: [each.latent_cache_path for each in items]}).tolist())
    large, small = found
    assert large[:3] == small[:3] == [0, 0, 0]
    assert large[3] > small[3] == 0
    assert large[4] > small[4] > 200  # the clip, of frames that were enlarged eightfold
    assert not quality.survey.warnings


@pytest.mark.musubi_tuner
def test_musubi_tuners_caches_of_earlier_images_are_named(musubi_run, images):
    from kohya_patch.musubi.image_quality import make_quality

    dead_leaves.draw(256, 5).save(images / "1_sharp" / "00.png")  # whose cache is kept, beside a new one
    os.utime(images / "1_sharp" / "00.png", (1e9, 1e9))
    os.utime(images / "clip.mp4", (2e9, 2e9))
    (warning,) = make_quality(musubi_run, AUTO).survey.warnings
    assert warning.startswith("4 images are newer")
    for name in ("00_0128x0128_wan.safetensors (of 00.png)", "clip_00004-009_0128x0128_wan.safetensors (of clip.mp4)"):
        assert warning.count(name) == 2
