"""Checkpoints that the engine cannot train are refused with the reason."""

from __future__ import annotations

import pytest
import torch

from freq_loss_plugin import ConfigError
from freq_loss_plugin.engine import model

# Warnings of diffusers, transformers and accelerate are not ours.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none", ["cannot be loaded", "diffusers folder"]),
        (lambda folder: folder, ["without model_index.json"]),
        (lambda folder: empty(folder / "model.ckpt"), ["expected .safetensors", "may run code"]),
        (lambda folder: empty(folder / "model.safetensors"), ["is not a complete safetensors file"]),
        (
            lambda folder: sdxl_checkpoint(folder / "model.safetensors"),
            ["is not an SD1.x", "sd-scripts"],
        ),
        (
            lambda folder: model_index(folder, "StableDiffusionXLPipeline"),
            ["is a StableDiffusionXLPipeline", "sd-scripts"],
        ),
    ],
    ids=["nothing", "empty folder", "pickle", "cut file", "sdxl file", "sdxl folder"],
)
def test_models_that_cannot_be_trained_are_refused(make_settings, tmp_path, monkeypatch, make, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as caught:
        model.load(make_settings(pretrained_model_name_or_path=str(make(tmp_path))), torch.device("cpu"))
    for word in words:
        assert word in str(caught.value)


def empty(file):
    file.write_bytes(b"")
    return file


def sdxl_checkpoint(file):
    from safetensors.torch import save_file

    names = ("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x")
    save_file({name: torch.zeros(1) for name in names}, file)
    return file


def model_index(folder, kind):
    (folder / "model_index.json").write_text(f'{{"_class_name": "{kind}"}}')
    return folder


def test_flags_that_contradict_the_model_are_refused(make_settings):
    with pytest.raises(ConfigError, match=r"v_parameterization = true.*'epsilon'.*v_parameterization = false"):
        model.load(make_settings(v_parameterization=True), torch.device("cpu"))


def test_of_a_single_file_the_users_word_on_the_prediction_counts(make_settings, tmp_path):
    """It says nothing of it itself, and diffusers takes an SD1.x for epsilon."""
    from freq_loss_plugin.toy_model import model_folder

    pipeline = model._load_pipeline(str(model_folder()))
    assert pipeline.scheduler.config.get("prediction_type", "epsilon") == "epsilon"
    file = empty(tmp_path / "v_prediction.safetensors")
    settings = make_settings(pretrained_model_name_or_path=str(file), v_parameterization=True)
    model._check(pipeline, settings)
    with pytest.raises(ConfigError, match="v_parameterization"):
        model._check(pipeline, make_settings(v_parameterization=True))
