"""The guidance token in real runs of sd-scripts: each image's features in the last token of its caption."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import hosts
import pytest
import toml
import torch
from safetensors.torch import save_file

from freq_loss_plugin import ConfigError
from freq_loss_plugin.guidance_token import features as guidance

pytestmark = [pytest.mark.sd_scripts, pytest.mark.long, pytest.mark.filterwarnings("default")]

WIDTH = 64  # of the narrow text encoder
# 128 × 128 for the photos and 192 × 64 for the wide ones.
BUCKETS = {"enable_bucket": True, "min_bucket_reso": 64, "bucket_reso_steps": 64, "resolution": "128,128"}


def recognizable(caption, folder=""):
    """Features that no other image has."""
    generator = torch.Generator().manual_seed(sum(map(ord, caption + folder)))
    return torch.randn(WIDTH, generator=generator)


def give_features(image, features, clip="test@1"):
    tensors, metadata = guidance.contents(image, features, clip)
    save_file(tensors, guidance.feature_file(image), metadata)


@pytest.fixture(scope="module")
def photos(material, tmp_path_factory):
    """The six photos twice: in a folder with one repeat, and two of them of another shape in a folder with two."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("guided")
    shutil.copytree(material / "photos" / "1_photo", folder / "1_photo")
    (folder / "2_wide").mkdir()
    for name in ("chelsea", "coffee"):
        with Image.open(folder / "1_photo" / f"{name}.png") as image:
            image.resize((144, 48)).save(folder / "2_wide" / f"wide_{name}.png")
        (folder / "2_wide" / f"wide_{name}.txt").write_text(f"a wide {name}")
    for image in folder.rglob("*.png"):
        give_features(image, recognizable(image.with_suffix(".txt").read_text()))
    return folder


def passes(run):
    return [event for event in run.events() if event["kind"] == "pass"]


def assert_every_pass_has_the_features_of_its_images(run, tokens=77):
    found = passes(run)
    assert found
    for event in found:
        states = event["states"]
        assert states.shape[1:] == (tokens, WIDTH)
        assert len(event["captions"]) == len(states)
        for caption, row in zip(event["captions"], states, strict=True):
            assert torch.equal(row[-1].float(), recognizable(caption)), caption
    return found


@pytest.fixture(scope="module")
def guided(sd_scripts, photos, tmp_path_factory):
    run = sd_scripts.train(
        tmp_path_factory.mktemp("run"),
        freq_loss={"guidance_token": 8.0, "dist_match": 0.003},
        train_data_dir=str(photos),
        max_train_steps=5,
        **BUCKETS,
    )
    assert run.returncode == 0, run.output
    return run


def test_both_passes_have_the_features_of_their_images(guided):
    found = assert_every_pass_has_the_features_of_its_images(guided)
    assert sum(event["extra"] for event in found) == sum(not event["extra"] for event in found) == 5
    assert "guidance_token = 8: on; the last text token of each image is its CLIP features" in guided.output
    assert "those of 8 images by test@1, 64 wide" in guided.output


def test_every_other_token_is_as_without(guided, sd_scripts, photos, tmp_path):
    plain = sd_scripts.train(
        tmp_path, freq_loss={"dist_match": 0.003}, train_data_dir=str(photos), max_train_steps=5, **BUCKETS
    )
    assert plain.returncode == 0, plain.output
    # Before the first step the text encoder is the same; afterwards it has learned something else.
    with_token, without = passes(guided)[0], passes(plain)[0]
    assert with_token["captions"] == without["captions"]
    assert torch.equal(with_token["states"][:, :-1], without["states"][:, :-1])
    assert not torch.equal(with_token["states"][:, -1], without["states"][:, -1])
    # The images, the noise and the timesteps of all steps are the same: naming images draws no random number.
    for first, second in zip(passes(guided), passes(plain), strict=True):
        assert first["captions"] == second["captions"]
        assert torch.equal(first["target"], second["target"])
        assert torch.equal(first["timesteps"], second["timesteps"])


def test_the_file_says_it_and_carries_the_mean_as_training_sees_it(guided, photos):
    assert guided.metadata["ss_freq_loss_guidance_token"] == "8.0"
    assert guided.metadata["ss_freq_loss_guidance_clip"] == "test@1"
    rows = [
        (recognizable(image.with_suffix(".txt").read_text()), int(image.parent.name[0]))
        for image in sorted(photos.rglob("*.png"))
    ]
    mean = sum(features * repeats for features, repeats in rows) / sum(repeats for _, repeats in rows)
    torch.testing.assert_close(guidance.stored_mean(guided.metadata), mean)
    from freq_loss_plugin.lora.metadata import read_lora

    assert read_lora(guided.folder / "lora.safetensors").has_guidance_token


VARIANTS = {
    "cached latents on disk, a loader": {
        "cache_latents": True,
        "cache_latents_to_disk": True,
        "max_data_loader_n_workers": 1,
    },
    "flips, two loaders, shuffled captions, accumulation, checkpointing": {
        "flip_aug": True,
        "max_data_loader_n_workers": 2,
        "persistent_data_loader_workers": True,
        "shuffle_caption": True,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    },
    "no buckets, random crops": {"enable_bucket": False, "random_crop": True, "resolution": "48,48"},
    "150 tokens, clip_skip": {"max_token_length": 150, "clip_skip": 2},
    "the token alone": {},
    "validation, 225 tokens, cached latents": {
        "validation_split": 0.3,
        "validation_seed": 1,
        "validate_every_n_steps": 2,
        "max_token_length": 225,
        "cache_latents": True,
    },
}
TOKENS = {"150 tokens, clip_skip": 152, "validation, 225 tokens, cached latents": 227}


@pytest.mark.parametrize("name", VARIANTS)
def test_features_meet_their_images_whatever_else_is_on(sd_scripts, photos, tmp_path, name):
    data = shutil.copytree(photos, tmp_path / "photos")  # caches are written beside the images
    freq_loss = {"guidance_token": True, "dist_match": 0 if name == "the token alone" else 0.003}
    run = sd_scripts.train(
        tmp_path, freq_loss=freq_loss, train_data_dir=str(data), max_train_steps=3, **{**BUCKETS, **VARIANTS[name]}
    )
    assert run.returncode == 0, run.output
    found = assert_every_pass_has_the_features_of_its_images(run, TOKENS.get(name, 77))
    assert run.metadata["ss_freq_loss_guidance_token"] == "1.0"
    assert all(event["is_train"] for event in found) == ("validation" not in name)
    if name == "the token alone":
        assert not any(event["extra"] for event in found)
        assert "the loss is off (dist_match = 0)" in run.output


def test_several_subsets_and_regularization_images(sd_scripts, photos, tmp_path):
    """A dataset config; the regularization images need features, too, and do not count in the mean."""
    regular = tmp_path / "regular"
    regular.mkdir()
    shutil.copy(photos / "1_photo" / "rocket.png", regular / "other.png")
    (regular / "other.txt").write_text("something else")
    give_features(regular / "other.png", recognizable("something else"))
    subsets = [
        {"image_dir": str(photos / "1_photo"), "num_repeats": 1},
        {"image_dir": str(photos / "2_wide"), "num_repeats": 3},
        {"image_dir": str(regular), "is_reg": True, "class_tokens": "thing"},
    ]
    config = {"general": {"caption_extension": ".txt"}, "datasets": [{**BUCKETS, "resolution": 128, "batch_size": 2}]}
    config["datasets"][0] |= {"subsets": subsets}
    file = tmp_path / "data.toml"
    file.write_text(toml.dumps(config))
    run = sd_scripts.train(
        tmp_path,
        freq_loss={"guidance_token": 8.0},
        dataset_config=str(file),
        max_train_steps=8,
    )
    assert run.returncode == 0, run.output
    found = assert_every_pass_has_the_features_of_its_images(run)
    assert {caption for event in found for caption in event["captions"]} >= {"something else", "a wide coffee"}


def test_samples_during_training_get_the_mean_in_their_prompt_alone(sd_scripts, photos, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --l 5 --d 1\n")
    run = sd_scripts.train(
        tmp_path,
        freq_loss={"guidance_token": 8.0, "dist_match": 0.003},
        train_data_dir=str(photos),
        sample_prompts=str(tmp_path / "prompts.txt"),
        sample_at_first=True,
        max_train_steps=1,
        **BUCKETS,
    )
    assert run.returncode == 0, run.output
    assert list((tmp_path / "sample").glob("*.png"))
    sampled = [event["states"] for event in run.events() if event["kind"] == "sample"]
    assert len(sampled) >= 2
    mean = guidance.stored_mean(run.metadata)
    for states in sampled:
        without, with_prompt = states
        torch.testing.assert_close(with_prompt[-1].float(), mean)
        # The text encoder's weights are random, and sd-scripts' weighing of prompts may make NaN of its words.
        assert not torch.allclose(without[-1].float(), mean, atol=0.1)
        assert not torch.allclose(with_prompt[-2].float(), mean, atol=0.1)


# -- refused before anything is lost -----------------------------------------------------------------------------------


def test_missing_features_stop_the_training_before_the_model_is_loaded(sd_scripts, photos, tmp_path):
    data = shutil.copytree(photos, tmp_path / "photos")
    guidance.feature_file(data / "1_photo" / "coffee.png").unlink()
    run = sd_scripts.train(tmp_path, freq_loss={"guidance_token": 8.0}, train_data_dir=str(data), **BUCKETS)
    assert run.returncode != 0
    assert "1 images have no features yet" in run.output.replace("1 of 1", "1")
    assert str(data / "1_photo" / "coffee.png") in run.output
    assert f"-m freq_loss_plugin extract-features --train_data_dir {data}" in run.output
    assert "load Diffusers pretrained" not in run.output


def test_features_of_another_width_are_explained(sd_scripts, photos, tmp_path):
    data = shutil.copytree(photos, tmp_path / "photos")
    for image in data.rglob("*.png"):
        give_features(image, torch.randn(768), clip="large@2")
    run = sd_scripts.train(tmp_path, freq_loss={"guidance_token": 8.0}, train_data_dir=str(data), **BUCKETS)
    assert run.returncode != 0
    assert "the features (CLIP large@2) are 768 wide, and the text encoder of this model 64" in run.output


def test_data_sets_survive_being_sent_to_a_loader_process(monkeypatch):
    """On Windows and macOS loader processes are not forked; a data set reaches them as a pickle."""
    import pickle

    monkeypatch.syspath_prepend(str(hosts.sd_scripts()))
    from library.train_util import DreamBoothDataset

    from kohya_patch.sd_scripts import image_names

    dataset = object.__new__(DreamBoothDataset)
    dataset.__dict__.update(marker=Path("x"))
    image_names.add_to([dataset])
    named = type(dataset)
    image_names.add_to([dataset])
    assert type(dataset) is named
    copied = pickle.loads(pickle.dumps(dataset))
    assert isinstance(copied, DreamBoothDataset)
    assert type(copied) is type(dataset) is not DreamBoothDataset
    assert copied.marker == Path("x")


def test_a_data_set_that_does_not_say_what_it_shows_is_refused(monkeypatch):
    """What dataset_class names is derived from sd-scripts' own MinimalDataset, which knows nothing of images."""
    monkeypatch.syspath_prepend(str(hosts.sd_scripts()))
    from library.train_util import MinimalDataset

    from kohya_patch.sd_scripts.guidance import TokenGuidance
    from kohya_patch.sd_scripts.trainers import TrainingRun

    class OwnDataset(MinimalDataset):
        pass

    dataset = OwnDataset((64, 64), 1.0)
    with pytest.raises(ConfigError, match=r"class OwnDataset has no buckets_indices.*remove dataset_class"):
        TokenGuidance(TrainingRun(None, argparse.Namespace(), datasets=(dataset,)), None)
