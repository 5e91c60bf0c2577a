"""What a run prints: the block at the start, warnings about settings that do little, the fraction after fifty steps."""

from __future__ import annotations

import argparse
import logging

import pytest
from hooked import NetworkTrainer

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.options import advice
from freq_loss_plugin.training.messages import FractionReport
from kohya_patch import report
from kohya_patch.sd_scripts.trainers import TrainingRun

# The host's own warnings are none of this project's business.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize(
    ("fraction", "level", "words"),
    [
        (0.005, logging.WARNING, "too little to act; multiply dist_match by 22"),
        (0.1, logging.INFO, "10.00% of the loss on average"),
        (0.8, logging.WARNING, "more than the base loss"),
    ],
)
def test_the_fraction_is_reported_once_after_fifty_steps(caplog, fraction, level, words):
    pytest.importorskip("accelerate")
    caplog.set_level(logging.INFO, logger="kohya_patch")
    fractions = FractionReport(1000)
    for step in range(1, 120):
        report.log(fractions.add_step(step, fraction))
        assert len(caplog.records) == (step >= 50)
    assert caplog.records[0].levelno == level
    assert words in caplog.text


@pytest.mark.parametrize(
    ("options", "trainer", "words"),
    [
        ({}, {"min_timestep": 0, "max_timestep": 1000}, None),
        ({}, {}, None),
        ({}, {"max_timestep": 400}, "the extra pass trains timesteps that the base loss leaves alone"),
        ({"timesteps": "own"}, {"max_timestep": 400}, "only 200..400 of it is ever drawn"),
        ({"timesteps": "own"}, {"min_timestep": 700}, "the term is always 0"),
        ({"dist_match": 0}, {"min_timestep": 700}, None),
    ],
)
def test_a_window_outside_the_trainers_own_is_a_warning(options, trainer, words):
    window = (trainer.get("min_timestep"), trainer.get("max_timestep"))
    warnings = advice.warnings(FreqLossConfig(**options), 4, *window)
    assert (not warnings) if words is None else words in warnings[0]


def announced(config, capsys, caplog, **args):
    """What is said at the start of an SD1.x run with these options and arguments: (block, warnings)."""
    pytest.importorskip("accelerate")
    training = TrainingRun(NetworkTrainer(), argparse.Namespace(**args))
    with caplog.at_level(logging.WARNING, logger="kohya_patch"):
        report.announce(training, config, "networks.lora")
    return " ".join(capsys.readouterr().out.split()), caplog.text


def test_the_block_names_a_fallback_and_drops_what_no_longer_matters(monkeypatch, capsys, caplog):
    monkeypatch.setattr("freq_loss_plugin.loss.params.resolve_method", lambda method: "fft")
    block, _ = announced(FreqLossConfig(), capsys, caplog, train_batch_size=4)
    assert "freq_loss_method = wavelet -> fft: the wavelet library cannot be imported (pip install" in block
    assert "freq_loss_cutoff = 0.25" in block
    assert "freq_loss_levels" not in block


def test_the_block_names_the_cost(capsys, caplog):
    block, warnings = announced(FreqLossConfig(timesteps="own"), capsys, caplog, train_batch_size=4)
    assert "cost: no extra pass" in block
    assert warnings == ""


def test_useless_settings_are_warnings_at_the_start(capsys, caplog):
    config = FreqLossConfig(low_weight=0.5, high_weight=0.5)
    _, warnings = announced(config, capsys, caplog, train_batch_size=1, max_timestep=300)
    for words in ("plain MSE of the batch sum", "batch size 1", "not inside the trainer's own 0..300"):
        assert words in warnings


def test_the_block_says_what_a_gradient_ratio_makes_of_dist_match(capsys, caplog):
    block, _ = announced(FreqLossConfig(gradient_ratio=0.1), capsys, caplog, train_batch_size=4)
    assert "dist_match = 0.003 (scaled by freq_loss_gradient_ratio)" in block
    assert "freq_loss_gradient_ratio = 0.1" in block
    assert "comparing gradients at the model's output" in block
    assert "grad_cosine" not in block


def test_with_a_gradient_ratio_the_fraction_is_reported_without_advice(caplog):
    pytest.importorskip("accelerate")
    caplog.set_level(logging.INFO, logger="kohya_patch")
    fractions = FractionReport(3, ratio_is_fixed=True)
    for step in range(1, 4):
        report.log(fractions.add_step(step, 0.001))
    assert "0.10% of the loss on average" in caplog.text
    assert "multiply" not in caplog.text


def test_validation_without_validation_images_is_a_warning(capsys, caplog):
    config = FreqLossConfig(validation=True)
    _, warnings = announced(config, capsys, caplog, train_batch_size=4)
    assert "set validation_split" in warnings
    assert "set logging_dir" in warnings
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="kohya_patch"):
        args = argparse.Namespace(train_batch_size=4, logging_dir="logs")
        report.announce(TrainingRun(NetworkTrainer(), args, validation_datasets=(object(),)), config, "networks.lora")
    assert caplog.text == ""


def test_what_is_off_with_the_loss_is_named(capsys, caplog):
    config = FreqLossConfig(dist_match=0.0, gradient_ratio=0.1, validation=True)
    block, warnings = announced(config, capsys, caplog, train_batch_size=4)
    assert "off (dist_match = 0)" in block
    assert "turns the loss off, and with it freq_loss_gradient_ratio, freq_loss_validation" in warnings
    assert "grad_cosine" not in warnings


def test_off_says_only_that_it_is_off(capsys, caplog):
    block, warnings = announced(FreqLossConfig(dist_match=0), capsys, caplog, train_batch_size=1, min_timestep=700)
    assert "off (dist_match = 0); networks.lora trains exactly as without the plug-in" in block
    assert warnings == ""
