"""What the tests of the engine share: options with and without the loss, and access to the files of a run."""

from __future__ import annotations

import functools

from safetensors import safe_open
from safetensors.torch import load_file

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.engine import demo, settings

OFF = FreqLossConfig(dist_match=0)
ON = FreqLossConfig(dist_match=0.05)


def write_toml(folder, run_settings, **loss):
    """A config.toml in ``folder`` with these settings and options of the loss."""
    file = folder / "config.toml"
    file.write_text(settings.as_toml(run_settings, FreqLossConfig(**loss)))
    return file


def load_lora(file):
    return load_file(file)


def metadata_of(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def quick_demo(monkeypatch):
    """Let the demo validate and sample less; what takes long there is tested whole by `test_train_script`."""
    monkeypatch.setattr(demo, "PROMPTS", 2)
    monkeypatch.setattr(demo, "HELD_OUT", 2)
    monkeypatch.setattr(demo, "Sampling", functools.partial(demo.Sampling, steps=2))
