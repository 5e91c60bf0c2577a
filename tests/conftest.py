"""Shared by all tests: the helpers beside them are importable, and randomness is the same in every run."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items):
    """Files with long tests begin, so that several processes end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


class _Logged(logging.Handler):
    """Warns of what transformers and diffusers only log: that something will be removed."""

    def emit(self, record):
        if "deprecated" in record.getMessage():
            warnings.warn(record.getMessage(), FutureWarning, stacklevel=2)


for library in ("transformers", "diffusers"):
    logging.getLogger(library).addHandler(_Logged(logging.WARNING))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Where no host calls it, what the next major versions of packages remove is an error, whatever a mark says."""
    if not any(map(item.get_closest_marker, ("sd_scripts", "comfyui", "musubi_tuner"))):
        warnings.filterwarnings("error", category=FutureWarning)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_measurements(tmp_path_factory):
    """Kept for the tests alone, in processes that they start, too; never in the user's home."""
    os.environ["FREQ_LOSS_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A small model, a tokenizer and six photos, for real training runs in sd-scripts."""
    import forks
    import hosts

    hosts.sd_scripts()
    folder = tmp_path_factory.mktemp("material")
    program = Path(__file__).parent / "sd_scripts_host" / "material.py"
    done = forks.run([str(program), str(folder), "--size", "64"], [], timeout=300)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture(scope="session")
def sd_scripts(material):
    """A checkout of sd-scripts and what it trains on."""
    import hosts

    sys.path.insert(0, str(Path(__file__).parent / "sd_scripts_host"))
    from runs import SdScripts

    return SdScripts(hosts.sd_scripts(), material)


@pytest.fixture(scope="session")
def plain_run(sd_scripts, tmp_path_factory):
    """sd-scripts without the plug-in."""
    run = sd_scripts.train(tmp_path_factory.mktemp("plain"))
    assert run.returncode == 0, run.output
    return run


@pytest.fixture(scope="module")
def stand_ins():
    """`sd_scripts_host/stand_ins.py`: the trainers of a checkout of sd-scripts with stand-in denoisers."""
    import hosts

    folders = [str(hosts.sd_scripts()), str(Path(__file__).parent / "sd_scripts_host")]
    sys.path[:0] = folders
    level = logging.getLogger().level
    yield importlib.import_module("stand_ins")
    for folder in folders:
        sys.path.remove(folder)
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="session")
def noise_images(tmp_path_factory):
    """Six captioned images of noise in kohya's layout, one of them twice per epoch."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for name, count in (("1_noise", 5), ("2_more", 1)):
        (folder / name).mkdir()
        for i in range(count):
            pixels = generator.integers(0, 256, size=(64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
            (folder / name / f"{i}.txt").write_text(f"noise, number {i}")
    return folder


@pytest.fixture
def make_settings(noise_images, tmp_path):
    """Settings of a short run of the engine on the toy model and `noise_images`; keyword arguments change them."""
    from freq_loss_plugin.engine.settings import Settings
    from freq_loss_plugin.toy_model import model_folder

    def make(**changes):
        values = {
            "pretrained_model_name_or_path": str(model_folder()),
            "train_data_dir": str(noise_images),
            "caption_extension": ".txt",
            "resolution": "64",
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "max_train_steps": 4,
            "output_dir": str(tmp_path / "output"),
            "output_name": "lora",
        }
        return Settings(**(values | changes))

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A few steps on the toy model at a high learning rate, so that the LoRA has an effect."""
    return train_toy_model(tmp_path_factory.mktemp("toy_model"), max_train_steps=4)


@pytest.fixture(scope="session")
def trained_with_token(tmp_path_factory):
    """The same with a guidance token; its LoRA carries the mean of the images' features."""
    return train_toy_model(tmp_path_factory.mktemp("guided"), max_train_steps=1, guidance_token=True)


def train_toy_model(folder, **changes):
    """Train on the demo's images; its settings are also written to config.toml."""
    from freq_loss_plugin.engine import demo, run, settings

    prepared = demo.prepare(folder, "weave")
    term_alone = {"dist_match": 0.05, "freq_loss_balance": "off", "freq_loss_image_quality": "off"}
    run_settings, loss = settings.read(prepared.values | {"learning_rate": 5e-3} | term_alone | changes)
    if loss.guided:
        prepared.extract_features()
    (folder / "config.toml").write_text(settings.as_toml(run_settings, loss))
    return run.train(run_settings, loss)


@pytest.fixture(scope="session")
def comfyui_server(trained, trained_with_token, tmp_path_factory):
    """A running ComfyUI with the pack, the toy model as a checkpoint, and LoRAs of the engine."""
    import shutil

    import hosts

    sys.path.insert(0, str(Path(__file__).parent / "comfyui_host"))
    from server import Server

    from freq_loss_plugin.toy_model import model_folder

    comfyui = hosts.comfyui()
    server = Server(comfyui, tmp_path_factory.mktemp("comfyui"), model_folder())
    for outcome, name in ((trained, "my_frequency_lora"), (trained_with_token, "my_guided_lora")):
        shutil.copy(outcome.lora, server.folder / "models" / "loras" / f"{name}.safetensors")
    shutil.copy(comfyui / "input" / "example.png", server.folder / "input")
    server.start()
    yield server
    server.stop()


_exit_status = 0


def pytest_sessionfinish(session, exitstatus):
    global _exit_status
    _exit_status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Leave without Python's own cleanup where sd-scripts was imported into this process.

    The native libraries that it brings can crash during that cleanup (seen once: a segmentation fault after the last of
    450 passed tests), which would turn the exit status into that of a failure.
    """
    if "library.train_util" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_exit_status)
