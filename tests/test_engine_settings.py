"""The engine's settings: the keys of a kohya TOML and the command line."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest
import toml

from freq_loss_plugin import ConfigError, FreqLossConfig
from freq_loss_plugin.engine import settings
from freq_loss_plugin.engine.cli import add_arguments, read_overrides
from freq_loss_plugin.options.fields import TABLE, key_of, type_name
from freq_loss_plugin.options.keys import SECTION

# Warnings of diffusers, transformers and accelerate are not ours.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network_dims": 8}, ["network_dims: not supported", "Did you mean network_dim?", "sd-scripts"]),
        ({"xformers": True}, ["xformers: not supported", "accelerate launch train_network.py"]),
        ({"network_dim": "8"}, ["network_dim = '8' (str)", "a whole number", "remove the quotes"]),
        ({"network_dim": 0}, ["network_dim = 0", ">= 1"]),
        ({"network_module": "networks.lora", "dist_match": 0, "guidance_token": True}, ["without the plug-in"]),
        ({"optimizer_type": "AdamW8bit"}, ["'AdamW8bit'", "'AdamW'"]),
        ({"mixed_precision": "bf"}, ["'bf'", "did you mean 'bf16'?"]),
        ({"cache_latents": False}, ["cache_latents = False", "one of True"]),
        ({"gradient_checkpointing": "true"}, ["gradient_checkpointing = 'true'", "true or false", "quotes"]),
        ({"resolution": "500"}, ["resolution = '500'", "divisible by 8"]),
        ({"resolution": "512x512"}, ["resolution = '512x512'", "width,height"]),
        ({"enable_bucket": True, "resolution": "128"}, ["resolution = '128'", "256 (min_bucket_reso)"]),
        ({"enable_bucket": True, "resolution": "512,1088"}, ["resolution = '512,1088'", "1024 (max_bucket_reso)"]),
        ({"enable_bucket": True, "resolution": "256,1024", "min_bucket_reso": 321}, ["320 (min_bucket_reso)"]),
        ({"output_name": ""}, ["output_name = ''", "my_lora"]),
        ({"min_timestep": 500, "max_timestep": 500}, ["min_timestep = 500", "max_timestep = 500"]),
        ({"learning_rate": 0.0}, ["nothing would be trained"]),
        ({"train_data_dir": "nowhere"}, ["train_data_dir = 'nowhere'", "an existing folder"]),
        ({"pretrained_model_name_or_path": ""}, ["pretrained_model_name_or_path is missing"]),
        ({"network_args": ["conv_dim=4"]}, ["'conv_dim=4'", "sd-scripts"]),
        ({"freq_loss_network_module": "lycoris.kohya"}, ["'lycoris.kohya'", "sd-scripts"]),
        ({"network_module": "networks.lora", "dist_match": 0.1}, ["without the plug-in", "kohya_patch"]),
        ({"network_module": "networks.lora_flux"}, ["'networks.lora_flux'", "'kohya_patch', 'networks.lora'"]),
        ({"network_args": ["dist_match=much"]}, ["dist_match = 'much'", "a number"]),
        ({"freq_loss_metod": "fft"}, ["freq_loss_metod", "Did you mean freq_loss_method?"]),
    ],
)
def test_keys_that_cannot_be_used_are_named(noise_images, changes, words):
    values = {"pretrained_model_name_or_path": "x", "train_data_dir": str(noise_images)}
    with pytest.raises(ConfigError) as caught:
        settings.read({"training": values | changes})
    for word in words:
        assert word in str(caught.value)


def test_a_kohya_toml_is_read_unchanged(noise_images):
    """The example for SD1.5, with its sections; sd-scripts reads the same file."""
    values = toml.load(ROOT / "examples" / "sd15.toml")
    values["data"]["train_data_dir"] = str(noise_images)
    run_settings, loss = settings.read(values)
    assert (run_settings.network_dim, run_settings.train_batch_size, run_settings.size) == (4, 4, (512, 512))
    assert run_settings.min_snr_gamma == loss.min_snr_gamma == 5.0
    assert loss == FreqLossConfig(timesteps="shared", gradient_ratio=0.1)
    assert settings.read(toml.loads(settings.as_toml(run_settings, loss))) == (run_settings, loss)


def test_defaults_of_rank_resolution_and_batch_size():
    by_name = settings.Settings.__dataclass_fields__
    assert [by_name[name].default for name in ("network_dim", "resolution", "train_batch_size")] == [4, "512", 4]


def parse_overrides(arguments):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return read_overrides(*parser.parse_known_args(arguments))


def test_the_help_has_every_key_with_its_meaning_and_default():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for options in (FreqLossConfig, settings.Settings):
        for option in dataclasses.fields(options):
            if options is FreqLossConfig and key_of(option) == "min_snr_gamma":
                continue  # it is among the training settings
            if type_name(option) == TABLE:
                continue  # a section of its own, not for a command line
            assert f"--{key_of(option)} " in text or f"--{key_of(option)} [" in text
            assert " ".join(option.metadata["meaning"].split()) in text
            assert all(
                str(choice) in text or str(choice).lower() in text for choice in option.metadata["choices"] or ()
            )


def test_the_command_line_takes_precedence(noise_images):
    arguments = [
        "--max_train_steps",
        "7",
        "--dist_match=0.01",
        "--network_train_unet_only",
        "--freq_loss_method",
        "fft",
    ]
    overrides = parse_overrides(arguments)
    values = {"pretrained_model_name_or_path": "x", "train_data_dir": str(noise_images), "max_train_steps": 3}
    run_settings, loss = settings.read(settings.override({"a": values, SECTION: {"dist_match": 0.5}}, overrides))
    assert (run_settings.max_train_steps, run_settings.network_train_unet_only) == (7, True)
    assert (loss.dist_match, loss.method) == (0.01, "fft")
    with pytest.raises(ConfigError, match=r"max_train_step: not supported.*Did you mean max_train_steps"):
        parse_overrides(["--max_train_step", "7"])


def test_networks_lora_trains_without_the_loss(noise_images):
    values = {
        "pretrained_model_name_or_path": "x",
        "train_data_dir": str(noise_images),
        "network_module": "networks.lora",
    }
    assert not settings.read({"training": values})[1].enabled


def test_network_args_take_precedence_over_the_section(noise_images):
    values = {
        "pretrained_model_name_or_path": "x",
        "train_data_dir": str(noise_images),
        "network_args": ["dist_match=0.02"],
    }
    assert settings.read({"training": values})[1].dist_match == 0.02
