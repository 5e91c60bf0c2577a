"""Every option is checked in one place; wrong values give errors that name the key, the value and the way out."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from pathlib import Path

import pytest

from freq_loss_plugin import ConfigError, FreqLossConfig
from freq_loss_plugin.options.advice import useless_settings
from freq_loss_plugin.options.image_rules import rules_by_image
from freq_loss_plugin.options.parsing import parse_pairs, parse_strings

# What a user may write, and words that the error must contain: the key, the value, what is allowed or nearest.
WRONG = [
    ({"dist_match": -0.1}, ["dist_match", "-0.1", ">= 0"]),
    ({"dist_match": float("nan")}, ["dist_match", "nan", "finite"]),
    ({"dist_match": float("inf")}, ["dist_match", "inf", "finite"]),
    ({"dist_match": "0.003"}, ["dist_match", "'0.003'", "a number", "quotes"]),
    ({"dist_match": True}, ["dist_match", "True", "a number"]),
    ({"dist_match": [0.003]}, ["dist_match", "[0.003]", "a number"]),
    ({"dist_mach": 0.003}, ["dist_mach", "unknown", "Did you mean dist_match?"]),
    ({"distmatch": 0.003}, ["distmatch", "Did you mean dist_match?"]),
    ({"freq_loss_metod": "fft"}, ["freq_loss_metod", "Did you mean freq_loss_method?"]),
    ({"freq_loss_wavelets": "db3"}, ["freq_loss_wavelets", "Did you mean freq_loss_wavelet?"]),
    ({"freqloss_method": "fft"}, ["freqloss_method", "Did you mean freq_loss_method?"]),
    ({"freq_loss_dist_match": 1.0}, ["freq_loss_dist_match", "unknown", "dist_match"]),
    ({"freq_loss_method": "dct"}, ["freq_loss_method", "'dct'", "'wavelet'", "'fft'"]),
    ({"freq_loss_method": "Wavelet"}, ["freq_loss_method", "did you mean 'wavelet'?"]),
    ({"freq_loss_method": 3}, ["freq_loss_method", "3 (int)", "'wavelet'"]),
    ({"freq_loss_wavelet": "db333"}, ["freq_loss_wavelet", "'db333'", "Did you mean 'db3"]),
    ({"freq_loss_wavelet": "morl"}, ["freq_loss_wavelet", "'morl'", "discrete"]),
    ({"freq_loss_levels": 0}, ["freq_loss_levels", "0", ">= 1"]),
    ({"freq_loss_levels": 2.5}, ["freq_loss_levels", "2.5", "a whole number"]),
    ({"freq_loss_levels": "2"}, ["freq_loss_levels", "'2'", "quotes"]),
    ({"freq_loss_cutoff": 0}, ["freq_loss_cutoff", "above 0"]),
    ({"freq_loss_cutoff": 0.6}, ["freq_loss_cutoff", "0.6", "at most 0.5"]),
    ({"freq_loss_low_weight": -1}, ["freq_loss_low_weight", "-1", ">= 0"]),
    ({"freq_loss_high_weight": -0.3}, ["freq_loss_high_weight", "-0.3", ">= 0"]),
    ({"freq_loss_timesteps": "mixed"}, ["freq_loss_timesteps", "'mixed'", "'unified'", "'own'"]),
    ({"freq_loss_min_timestep": 600, "freq_loss_max_timestep": 200}, ["600", "200", "empty"]),
    ({"freq_loss_min_timestep": 600}, ["freq_loss_min_timestep = 600", "freq_loss_max_timestep = 600", "empty"]),
    ({"freq_loss_max_timestep": 1001}, ["freq_loss_max_timestep", "1001", "0 to 1000"]),
    ({"freq_loss_min_timestep": -1}, ["freq_loss_min_timestep", "-1", "0 to 1000"]),
    ({"freq_loss_min_timestep": 0.2}, ["freq_loss_min_timestep", "0.2", "a whole number"]),
    ({"freq_loss_sample_weights": "snr"}, ["freq_loss_sample_weights", "'snr'", "did you mean 'min_snr'?"]),
    ({"freq_loss_reduction": "none"}, ["freq_loss_reduction", "'none'", "'sum'", "'mean'"]),
    ({"min_snr_gamma": -5.0}, ["min_snr_gamma", "-5.0", "> 0"]),
    ({"guidance_token": -8.0}, ["guidance_token = -8.0", ">= 0"]),
    ({"freq_loss": 0.003}, ["freq_loss = 0.003", "[freq_loss]"]),
    ({"freq_loss": {"method": "fft"}}, ["method", "[freq_loss]", "Did you mean freq_loss_method?"]),
    ({"freq_loss": {"dist_match": 1.0}, "dist_match": 2.0}, ["dist_match", "twice", "1.0", "2.0"]),
    ({"freq_loss": {"dist_match": 1.0}, "more": {"dist_match": 2.0}}, ["dist_match", "twice", "[more]"]),
    ({"training": {"freq_loss_metod": "fft"}}, ["freq_loss_metod", "Did you mean freq_loss_method?"]),
]


@pytest.mark.parametrize(("mapping", "words"), WRONG, ids=lambda value: str(value)[:60])
def test_wrong_options(mapping, words):
    with pytest.raises(ConfigError) as caught:
        FreqLossConfig.from_mapping(mapping)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["dist_match"], ["'dist_match'", "key=value"]),
        (["dist_match=much"], ["dist_match", "'much'", "a number"]),
        (["freq_loss_levels=2.5"], ["freq_loss_levels", "'2.5'", "a whole number"]),
        (["dist_match=1", "dist_match=2"], ["dist_match", "twice", "'1'", "'2'"]),
        (["freq_loss_levelz=2"], ["freq_loss_levelz", "Did you mean freq_loss_levels?"]),
        (["dist_match="], ["dist_match", "''", "a number"]),
    ],
)
def test_wrong_strings(items, words):
    with pytest.raises(ConfigError) as caught:
        FreqLossConfig.from_mapping(parse_strings(FreqLossConfig, parse_pairs(items)))
    for word in words:
        assert word in str(caught.value)


def test_defaults_are_those_of_the_specification():
    assert dataclasses.asdict(FreqLossConfig.from_mapping({})) == {
        "dist_match": 0.003,
        "method": "wavelet",
        "wavelet": "db3",
        "levels": 2,
        "cutoff": 0.25,
        "low_weight": 0.7,
        "high_weight": 0.3,
        "timesteps": "unified",
        "min_timestep": 200,
        "max_timestep": 600,
        "sample_weights": "none",
        "reduction": "sum",
        "balance": "off",
        "balance_power": 0.5,
        "gradient_ratio": 0.0,
        "grad_cosine": False,
        "validation": False,
        "image_quality": "off",
        "image_quality_threshold": 0.02,
        "image_rules": None,
        "guidance_token": 0.0,
        "network_module": None,
        "min_snr_gamma": 5.0,
    }


def test_a_mapping_a_namespace_a_section_and_strings_give_the_same():
    mapping = {"dist_match": 1, "freq_loss_levels": 3, "freq_loss_method": "fft", "learning_rate": 1e-4}
    expected = FreqLossConfig(dist_match=1, levels=3, method="fft")
    assert FreqLossConfig.from_mapping(mapping) == expected
    assert FreqLossConfig.from_mapping(argparse.Namespace(**mapping)) == expected
    section = {key: mapping[key] for key in ("dist_match", "freq_loss_levels", "freq_loss_method")}
    assert FreqLossConfig.from_mapping({"freq_loss": section, "learning_rate": 1e-4}) == expected
    strings = ["dist_match=1", "freq_loss_levels = 3", "freq_loss_method=fft"]
    whole_file = {"freq_loss": section, "training": {"min_snr_gamma": 2.0, "learning_rate": 1e-4}, "title": "mine"}
    assert FreqLossConfig.from_mapping(whole_file) == dataclasses.replace(expected, min_snr_gamma=2.0)
    assert FreqLossConfig.from_mapping(parse_strings(FreqLossConfig, parse_pairs(strings))) == expected


def test_options_of_the_trainer_pass_and_none_means_not_given():
    trainer = {
        "learning_rate": 1e-4,
        "loss_type": "l2",
        "min_timestep": None,
        "min_snr_gamma": None,
        "dist_match": None,
    }
    assert FreqLossConfig.from_mapping(trainer) == FreqLossConfig()
    assert FreqLossConfig.from_mapping({"min_snr_gamma": 0}).min_snr_gamma == 5.0
    assert FreqLossConfig.from_mapping({"min_snr_gamma": 3}).min_snr_gamma == 3
    assert FreqLossConfig.from_mapping({"guidance_token": 0}) == FreqLossConfig()


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FreqLossConfig().dist_match = 1.0


def test_size_is_checked_for_wavelets_only():
    FreqLossConfig(levels=3).check_size(8, 9)
    FreqLossConfig(levels=3, method="fft").check_size(2, 2)
    with pytest.raises(ConfigError, match=r"freq_loss_levels = 3.*8 × 8.*7 × 9.*freq_loss_levels = 2"):
        FreqLossConfig(levels=3).check_size(7, 9)


def test_useless_settings_are_told_and_useful_ones_are_not():
    assert useless_settings(FreqLossConfig(), batch_size=4) == []
    assert useless_settings(FreqLossConfig(dist_match=0), batch_size=1) == []
    (alone,) = useless_settings(FreqLossConfig(), batch_size=1)
    assert "batch size 1" in alone
    (equal,) = useless_settings(FreqLossConfig(method="fft", low_weight=0.5, high_weight=0.5), 4)
    assert "is the plain MSE" in equal
    (nothing,) = useless_settings(FreqLossConfig(low_weight=0, high_weight=0), 4)
    assert "always 0" in nothing


def test_metadata_hold_every_option_as_text():
    metadata = FreqLossConfig(levels=3).metadata()
    assert metadata["ss_freq_loss_levels"] == "3"
    assert len(metadata) == len(dataclasses.fields(FreqLossConfig))
    assert all(isinstance(value, str) for value in metadata.values())


RULES = {"10_scans": {"least_timestep": 600}, "5_thumbnails": {"effective_resolution": 0.25}}


@pytest.mark.parametrize(
    "values",
    [
        {"freq_loss": {"image_quality": RULES}},
        {"image_quality": RULES},  # what sd-scripts makes of it
        argparse.Namespace(image_quality=RULES, learning_rate=1e-4),
    ],
    ids=["section", "flattened", "namespace"],
)
def test_rules_are_a_section_of_their_own(values):
    config = FreqLossConfig.from_mapping(values)
    assert config.image_rules == RULES
    assert config.gated
    assert config.changes_training
    assert not config.without_effect().changes_training
    assert config.metadata()["ss_freq_loss_image_rules"] == str(RULES)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"least_timestep": 1000}, "a timestep from 0 to below 1000"),
        ({"least_timestep": True}, "expected"),
        ({"effective_resolution": 0}, "above 0 and at most 1"),
        ({"effective_resolution": "0.5"}, "expected"),
        ({"resolution": 0.5}, "did you mean effective_resolution?"),
        ({"least_timestep": 1, "effective_resolution": 0.5}, "expected"),
        ({}, "expected"),
        (600, "= 600: expected"),
    ],
    ids=str,
)
def test_a_rule_that_cannot_be_is_refused(rule, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        FreqLossConfig.from_mapping({"freq_loss": {"image_quality": {"10_scans": rule}}})
    assert '[freq_loss.image_quality] "10_scans"' in str(error.value)


def test_rules_are_not_a_text():
    with pytest.raises(
        ConfigError, match=r"image_quality = 'auto' \(str\): expected a section \[freq_loss.image_quality"
    ):
        FreqLossConfig.from_mapping({"image_quality": "auto"})


def test_rules_hold_for_the_nearest_folder():
    images = [Path(name) for name in ("/a/10_scans/1.png", "/a/10_scans/5_thumbnails/1.png", "/b/1_other/1.png")]
    found = rules_by_image(RULES, images)
    assert found == {images[0]: RULES["10_scans"], images[1]: RULES["5_thumbnails"]}
    assert rules_by_image({"a/10_scans": RULES["10_scans"]}, images).keys() == set(images[:2])
    with pytest.raises(ConfigError, match=r"\"10_scan\": no image of this run .* Did you mean '10_scans'"):
        rules_by_image({"10_scan": RULES["10_scans"]}, images)


@pytest.mark.parametrize("threshold", [0, -1, 16, math.inf])
def test_a_threshold_is_a_fraction(threshold):
    with pytest.raises(ConfigError, match=r"image_quality_threshold = .*: expected a number above 0 and at most 1"):
        FreqLossConfig(image_quality_threshold=threshold)
