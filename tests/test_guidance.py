"""The guidance token without a host: the token, feature files, and the images of a run."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from freq_loss_plugin import ConfigError, FreqLossConfig
from freq_loss_plugin.guidance_token import features as guidance
from freq_loss_plugin.guidance_token.features import FeatureError, feature_file, replace_last_token
from freq_loss_plugin.image_folders import find_images
from freq_loss_plugin.options.parsing import parse_strings

COMMAND = "make-features"


# -- the token ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [77, 152, 227])
def test_the_last_token_is_the_features_and_nothing_else_changes(tokens, dtype):
    states, features = torch.randn(3, tokens, 16).to(dtype), torch.randn(3, 16)
    before = states.clone()
    replaced = replace_last_token(states, features)
    assert replaced.dtype == dtype
    assert torch.equal(replaced[:, -1], features.to(dtype))
    assert torch.equal(replaced[:, :-1], states[:, :-1])
    assert torch.equal(states, before)


def test_strength_goes_from_the_token_to_the_features():
    states, features = torch.randn(2, 5, 4), torch.randn(1, 4)
    assert torch.equal(replace_last_token(states, features, 0.0), states)
    torch.testing.assert_close(
        replace_last_token(states, features, 0.25)[:, -1], 0.75 * states[:, -1] + 0.25 * features
    )
    assert torch.equal(replace_last_token(states, features, 1.0)[:, -1], features.expand(2, 4))


def test_the_text_encoder_is_trained_by_the_other_tokens_alone():
    states = torch.randn(2, 5, 4, requires_grad=True)
    replace_last_token(states, torch.randn(2, 4)).sum().backward()
    assert torch.equal(states.grad[:, :-1], torch.ones(2, 4, 4))
    assert torch.equal(states.grad[:, -1], torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("states", "features", "words"),
    [
        ((2, 77, 768), (2, 1024), r"\(2, 77, 768\).*\(2, 1024\).*same d"),
        ((2, 768), (2, 768), "expected"),
        ((2, 77, 768), (3, 768), "3 features for 2 samples"),
    ],
)
def test_shapes_that_do_not_fit(states, features, words):
    with pytest.raises(ValueError, match=words):
        replace_last_token(torch.zeros(states), torch.zeros(features))


# -- the option --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [8.0, 8, 1, True, 0.001])
def test_any_number_above_zero_and_true_mean_on(value):
    assert FreqLossConfig.from_mapping({"freq_loss": {"guidance_token": value}}).guided
    assert FreqLossConfig.from_mapping(parse_strings(FreqLossConfig, {"guidance_token": str(value).lower()})).guided


@pytest.mark.parametrize("value", [0, 0.0, False])
def test_zero_and_false_mean_off(value):
    config = FreqLossConfig.from_mapping({"freq_loss": {"guidance_token": value}})
    assert not config.guided
    assert config == FreqLossConfig()
    assert not FreqLossConfig.from_mapping(parse_strings(FreqLossConfig, {"guidance_token": str(value).lower()})).guided


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "yes", [1]])
def test_other_values_are_refused(value):
    with pytest.raises(ConfigError, match="guidance_token"):
        FreqLossConfig.from_mapping({"freq_loss": {"guidance_token": value}})


# -- feature files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three images (any bytes will do) with features 1, 2 and 3."""
    for number, name in enumerate(("a.png", "a.jpg", "b.webp"), 1):
        (tmp_path / name).write_bytes(name.encode() * number)
        write(tmp_path / name, torch.full((4,), float(number)))
    return tmp_path


def write(image, features, clip="clip@1"):
    tensors, metadata = guidance.contents(image, features, clip)
    save_file(tensors, feature_file(image), metadata)


def weights_of(folder, weights=(1, 1, 1)):
    return dict(zip((folder / name for name in ("a.png", "a.jpg", "b.webp")), weights, strict=True))


def test_features_are_read_back_with_their_weighted_mean(folder):
    loaded = guidance.load(weights_of(folder, (2, 0, 1)), COMMAND)
    assert [values[0].item() for values in loaded.by_image.values()] == [1, 2, 3]
    assert loaded.mean.tolist() == pytest.approx([5 / 3] * 4)
    assert (loaded.clip, loaded.width) == ("clip@1", 4)


def test_images_of_one_name_and_two_endings_have_files_of_their_own(folder):
    assert feature_file(folder / "a.png") != feature_file(folder / "a.jpg")


def test_missing_features_are_listed_with_the_command(folder):
    for name in ("a.png", "b.webp"):
        feature_file(folder / name).unlink()
    assert guidance.missing(weights_of(folder)) == [folder / "a.png", folder / "b.webp"]
    with pytest.raises(FeatureError) as caught:
        guidance.load(weights_of(folder), COMMAND)
    message = str(caught.value)
    for text in ("2 of 3 images have no features yet", str(folder / "a.png"), str(folder / "b.webp"), COMMAND):
        assert text in message


def test_many_missing_features_are_not_all_listed(tmp_path):
    with pytest.raises(FeatureError, match=r"40 of 40 .*and 35 more"):
        guidance.load({tmp_path / f"{number}.png": 1 for number in range(40)}, COMMAND)


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"x" * 100)])
def test_damaged_features_count_as_missing(folder, damage):
    damage(feature_file(folder / "a.png"))
    assert not guidance.is_current(folder / "a.png", "clip@1")
    with pytest.raises(FeatureError, match="1 of 3 images have no features yet"):
        guidance.load(weights_of(folder), COMMAND)


def test_changed_images_are_refused_and_copied_ones_are_not(folder, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    for file in folder.iterdir():
        shutil.copyfile(file, copy / file.name)  # new times, same contents
    assert guidance.load(weights_of(copy), COMMAND).width == 4
    assert guidance.is_current(copy / "a.png", "clip@1")
    image = copy / "a.png"
    image.write_bytes(b"A.PNG")  # as long as before
    os.utime(image, ns=(1, 1))
    assert not guidance.is_current(image, "clip@1")
    with pytest.raises(FeatureError, match=r"1 of 3 images have changed since their features were computed: .*a\.png"):
        guidance.load(weights_of(copy), COMMAND)


def test_features_of_two_models_are_refused(folder):
    write(folder / "a.jpg", torch.ones(4), clip="other@2")
    with pytest.raises(FeatureError, match=r"different models: clip@1 \(for instance a\.png\); other@2"):
        guidance.load(weights_of(folder), COMMAND)
    assert not guidance.is_current(folder / "a.jpg", "clip@1")


def test_a_lora_file_contains_the_mean(folder, tmp_path):
    features = guidance.load(weights_of(folder), COMMAND)
    metadata = guidance.file_metadata(8.0, features)
    file = tmp_path / "lora.safetensors"
    save_file({"a.alpha": torch.zeros(())}, file, metadata)
    with safe_open(file, "pt") as opened:
        stored = opened.metadata()
    assert torch.equal(guidance.stored_mean(stored), features.mean)
    assert stored["ss_freq_loss_guidance_token"] == "8.0"
    assert stored["ss_freq_loss_guidance_clip"] == "clip@1"
    assert guidance.stored_mean({}) is None


@pytest.mark.parametrize("text", ["???", "abc", "AAAAAAA=", "AADAfw=="])
def test_a_damaged_mean_is_an_error(text):
    with pytest.raises(ValueError, match=r"ss_freq_loss_guidance_mean .*damaged"):
        guidance.stored_mean({"ss_freq_loss_guidance_mean": text})


# -- the images of a run ------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    for name in ("train/2_cat/1.png", "train/1_dog/2.JPG", "train/0_off/3.png", "train/notes/4.png", "reg/1_x/5.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "train" / "2_cat" / "1.txt").write_text("a cat")
    return tmp_path


def names(paths):
    return sorted(path.name for path in paths)


def test_folders_with_repeats(tree):
    assert names(find_images(train_data_dir=str(tree / "train"))) == ["1.png", "2.JPG"]
    both = find_images(train_data_dir=str(tree / "train"), reg_data_dir=str(tree / "reg"))
    assert names(both) == ["1.png", "2.JPG", "5.webp"]
    assert all(path.is_absolute() for path in both)


@pytest.mark.parametrize("ending", ["toml", "json"])
def test_dataset_configs(tree, ending):
    import toml

    folders = [tree / "train" / "2_cat", tree / "reg" / "1_x", tree / "train" / "2_cat"]
    config = {"datasets": [{"subsets": [{"image_dir": str(folder)} for folder in folders]}]}
    file = tree / f"config.{ending}"
    file.write_text(json.dumps(config) if ending == "json" else toml.dumps(config))
    assert names(find_images(dataset_config=str(file), train_data_dir="/nowhere")) == ["1.png", "5.webp"]


def test_metadata_files(tree):
    file, lines = tree / "meta.json", tree / "meta.jsonl"
    file.write_text(json.dumps({"1": {"caption": "a"}, str(tree / "reg/1_x/5.webp"): {"caption": "b"}}))
    assert names(find_images(in_json=str(file), train_data_dir=str(tree / "train/2_cat"))) == ["1.png", "5.webp"]
    lines.write_text(json.dumps({"image_path": str(tree / "train/1_dog/2.JPG")}) + "\n\n")
    assert names(find_images(in_json=str(lines))) == ["2.JPG"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "none of train_data_dir, reg_data_dir, dataset_config, in_json is given"),
        ({"train_data_dir": "/nowhere"}, "train_data_dir = '/nowhere': there is no such folder"),
        ({"dataset_config": "/nowhere.toml"}, "dataset_config /nowhere.toml: there is no such file"),
        ({"in_json": "/nowhere.json"}, "metadata file '/nowhere.json' cannot be read"),
    ],
)
def test_what_does_not_exist_is_named(given, words):
    with pytest.raises(ConfigError, match=words):
        find_images(**given)


def test_an_empty_folder_says_what_was_expected(tmp_path):
    with pytest.raises(ConfigError, match=r"Expected .png, .* files in folders named like 10_mycat"):
        find_images(train_data_dir=str(tmp_path))
