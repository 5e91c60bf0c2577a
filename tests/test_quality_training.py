"""Real runs of sd-scripts on the toy model: images train only from their least timestep on."""

from __future__ import annotations

import shutil

import bad_images
import hosts
import pytest
import torch
from bad_images import compressed, enlarged, scene

from freq_loss_plugin.toy_model import model_folder

pytestmark = [pytest.mark.sd_scripts, pytest.mark.long, pytest.mark.filterwarnings("default")]

AUTO = {"dist_match": 0, "freq_loss_image_quality": "auto"}
BUCKETS = {"enable_bucket": True, "min_bucket_reso": 64, "bucket_reso_steps": 64}
SETTINGS = {"resolution": "128,128", "max_train_steps": 24, "network_train_unet_only": True}
SHARP, BAD, WIDE, REGULARIZATION = "2_sharp", "2_bad", "2_wide", "1_reg"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """sd-scripts with the toy model, whose VAE has learned such images."""
    folder = tmp_path_factory.mktemp("toy")
    shutil.copytree(model_folder() / "tokenizer", folder / "tokenizers" / "openai_clip-vit-large-patch14")
    host = hosts.sd_scripts()
    runs = pytest.importorskip("runs")
    return runs.SdScripts(host, folder, model_folder() / "unet" / "config.json")


@pytest.fixture(scope="module", autouse=True)
def _host_helpers():
    import sys
    from pathlib import Path

    folder = str(Path(__file__).parent / "sd_scripts_host")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Sharp ones, ones enlarged eightfold with two repeats, wide ones at JPEG quality 10, and blurred reg images."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    bad_images.write(folder / "sharp" / SHARP, [scene(number) for number in range(4)])
    mixed = folder / "mixed"
    shutil.copytree(folder / "sharp" / SHARP, mixed / SHARP)
    bad_images.write(mixed / BAD, [enlarged(scene(number), 8) for number in range(10, 13)])
    wide = []
    for number in (20, 24):
        image = Image.new("RGB", (256, 96))
        for place in range(2):
            image.paste(scene(number + place), (128 * place, 0))
        wide.append(compressed(image.resize((192, 72), Image.Resampling.LANCZOS), 10))
    bad_images.write(mixed / WIDE, wide)
    bad_images.write(folder / "reg" / REGULARIZATION, [enlarged(scene(30), 4)])
    return folder


def train(toy, folder, images, freq_loss, **settings):
    settings = {"pretrained_model_name_or_path": str(model_folder()), **SETTINGS, **settings}
    return toy.train(folder, freq_loss=freq_loss, train_data_dir=str(images), **settings)


def timesteps_by_folder(run, rank=0):
    found = {}
    for event in run.events(rank):
        if event["kind"] == "pass":
            for caption, timestep in zip(event["captions"], event["timesteps"].tolist(), strict=True):
                found.setdefault(caption.split()[0], []).append(timestep)
    return found


def test_a_set_of_sharp_images_trains_bit_identically(toy, images, tmp_path):
    plain = train(toy, tmp_path / "plain", images / "sharp", None, network_module="networks.lora", max_train_steps=4)
    run = train(toy, tmp_path / "auto", images / "sharp", AUTO, max_train_steps=4)
    assert plain.returncode == run.returncode == 0, plain.output + run.output
    assert "4 images: 4 full quality" in run.output
    assert all(torch.equal(run.lora[name], plain.lora[name]) for name in plain.lora)


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
def test_bad_images_train_from_their_least_timestep_on(toy, images, tmp_path, cache):
    run = train(
        toy,
        tmp_path,
        images / "mixed",
        AUTO,
        reg_data_dir=str(images / "reg"),
        cache_latents=cache,
        flip_aug=True,
        **BUCKETS,
    )
    assert run.returncode == 0, run.output
    found = timesteps_by_folder(run)
    assert min(found[SHARP]) < 300
    assert all(min(found[name]) >= least for name, least in {BAD: 300, WIDE: 200, REGULARIZATION: 50}.items())
    summary = run.metadata["ss_freq_loss_image_quality_summary"]
    assert summary in run.output
    assert summary.startswith("10 images: 4 full quality; ")
    assert "JPEG quality 10" in summary
    assert run.metadata["ss_freq_loss_image_quality"] == "auto"


def test_two_processes_agree_and_a_resumed_run_goes_on(toy, images, tmp_path):
    settings = {"processes": 2, "max_train_steps": 6, "save_state": True, "save_every_n_steps": 3, **BUCKETS}
    options = {**AUTO, "dist_match": 0.01, "freq_loss_timesteps": "shared", "freq_loss_gradient_ratio": 0.1}
    whole = train(toy, tmp_path / "whole", images / "mixed", options, **settings)
    assert whole.returncode == 0, whole.output
    for rank in range(2):
        for name, timesteps in timesteps_by_folder(whole, rank).items():
            assert min(timesteps) >= {SHARP: 0, BAD: 300, WIDE: 200}[name]
    state = tmp_path / "whole" / "lora-step00000003-state"
    resumed = train(toy, tmp_path / "resumed", images / "mixed", options, resume=str(state), **settings)
    assert resumed.returncode == 0, resumed.output
    found = timesteps_by_folder(resumed)
    assert {BAD, WIDE} & found.keys()
    assert all(min(timesteps) >= 200 for name, timesteps in found.items() if name != SHARP)


def test_by_hand(toy, images, tmp_path):
    rules = {WIDE: {"least_timestep": 400}, BAD: {"effective_resolution": 0.125}}
    run = train(toy, tmp_path, images / "mixed", {"dist_match": 0, "image_quality": rules}, **BUCKETS)
    assert run.returncode == 0, run.output
    found = timesteps_by_folder(run)
    assert min(found[SHARP]) < 400  # nothing is said of it
    assert min(found[WIDE]) >= 400
    assert min(found[BAD]) >= 300
    assert "2 by your own rule, train at t >= 400" in run.output


def test_a_rule_for_no_folder_is_told_before_training(toy, images, tmp_path):
    rules = {"1_other": {"least_timestep": 1}}
    run = train(toy, tmp_path, images / "mixed", {"dist_match": 0, "image_quality": rules})
    assert run.returncode != 0
    assert "no image of this run is in a folder of that name" in run.output.replace("\n", " ")
    assert not any(event["kind"] == "pass" for event in run.events())
