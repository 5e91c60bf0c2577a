"""Shared by all tests: the helpers beside them are importable, and randomness is the same in every run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A small model, a tokenizer and six photos, for real trainings in sd-scripts."""
    import hosts

    hosts.sd_scripts()
    folder = tmp_path_factory.mktemp("material")
    subprocess.run(
        [sys.executable, str(Path(__file__).parent / "sd_scripts_host" / "material.py"), str(folder), "--size", "64"],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="session")
def sd_scripts(material):
    """A checkout of sd-scripts and what it trains on."""
    import hosts

    sys.path.insert(0, str(Path(__file__).parent / "sd_scripts_host"))
    from runs import SdScripts

    return SdScripts(hosts.sd_scripts(), material)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The embedded default, for a few steps at a high rate, so that the LoRA changes something; its config.toml too."""
    return train_embedded(tmp_path_factory.mktemp("embedded"), max_train_steps=4)


@pytest.fixture(scope="session")
def trained_with_token(tmp_path_factory):
    """The same with a guidance token; its LoRA carries the mean of the pictures' features."""
    return train_embedded(tmp_path_factory.mktemp("guided"), max_train_steps=1, guidance_token=True)


def train_embedded(folder, **changes):
    from freq_loss_plugin.engine import demo, settings, training

    prepared = demo.prepare(folder, "weave")
    made, loss = settings.read(prepared.values | {"learning_rate": 5e-3} | changes)
    if loss.guided:
        prepared.extract_features()
    (folder / "config.toml").write_text(settings.as_toml(made, loss))
    return training.train(made, loss)


@pytest.fixture(scope="session")
def comfyui_server(trained, trained_with_token, tmp_path_factory):
    """A running ComfyUI with the pack, the embedded model as a checkpoint, and LoRAs of the engine."""
    import shutil

    import hosts

    sys.path.insert(0, str(Path(__file__).parent / "comfyui_host"))
    from server import Server

    from freq_loss_plugin.embedded import model_folder

    comfyui = hosts.comfyui()
    server = Server(comfyui, tmp_path_factory.mktemp("comfyui"), model_folder())
    for outcome, name in ((trained, "my_frequency_lora"), (trained_with_token, "my_guided_lora")):
        shutil.copy(outcome.lora, server.folder / "models" / "loras" / f"{name}.safetensors")
    shutil.copy(comfyui / "input" / "example.png", server.folder / "input")
    server.start()
    yield server
    server.stop()


_exit_status: int | None = None


def pytest_sessionfinish(session, exitstatus):
    global _exit_status
    _exit_status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Leave without Python's own clean-up once everything has been told.

    The native libraries that sd-scripts brings into this process can crash in it (seen once: a segmentation fault after
    the last of 450 passed tests), which would turn the exit status into that of a failure.
    """
    if _exit_status is None:
        return  # no session: pytest has something to say about its command line
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_exit_status)
