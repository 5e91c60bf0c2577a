"""The toy model and its LoRAs in three hosts: diffusers, the real sd-scripts, the real ComfyUI."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import hosts
import numpy as np
import pytest
import toml
import torch

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.lora.kohya_format import kohya_weights
from freq_loss_plugin.toy_model import model_folder
from freq_loss_plugin.toy_model.attributes import measure
from freq_loss_plugin.toy_model.scenes import draw, random_scene

pytestmark = pytest.mark.filterwarnings("default")

TESTS = Path(__file__).parent
PROMPT = "a red circle at the top left on white with checks, weave style"


def test_it_is_small_and_has_the_topology_of_sd15():
    folder = model_folder()
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 16e6
    unet = json.loads((folder / "unet" / "config.json").read_text())
    vae = json.loads((folder / "vae" / "config.json").read_text())
    assert unet["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert unet["up_block_types"] == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert (unet["layers_per_block"], unet["attention_head_dim"], len(unet["block_out_channels"])) == (2, 8, 4)
    assert (vae["layers_per_block"], len(vae["block_out_channels"]), vae["latent_channels"]) == (2, 4, 4)
    assert vae["scaling_factor"] == 0.18215


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    loaded = StableDiffusionPipeline.from_pretrained(model_folder(), safety_checker=None).to(dtype=torch.float32)
    assert isinstance(loaded.scheduler, DDIMScheduler)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def validation_scenes(count):
    # A seed that no stage of its training and no demo uses.
    generator = np.random.default_rng((99, 7))
    return [random_scene(generator) for _ in range(count)]


@torch.no_grad()
def test_its_autoencoder_restores_images_that_it_has_not_seen(pipeline):
    images = torch.from_numpy(np.stack([draw(scene) for scene in validation_scenes(8)])).permute(0, 3, 1, 2)
    latents = pipeline.vae.encode(images * 2 - 1).latent_dist.mode()
    restored = (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    psnr = -10 * (restored - images).square().mean(dim=(1, 2, 3)).log10()
    assert psnr.mean() > 27
    assert (latents * pipeline.vae.config.scaling_factor).std() == pytest.approx(1, abs=0.15)


def test_it_draws_what_captions_say(pipeline):
    """A sample small enough for every run; the model card has the figures of a larger one."""
    scenes = validation_scenes(16)
    captions = [scene.caption() for scene in scenes]
    sampled = pipeline(
        captions,
        height=128,
        width=128,
        num_inference_steps=20,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    measured = [measure(image) for image in sampled]
    at_least = {"shape": 0.8, "color": 0.9, "position": 0.8, "background": 0.8, "texture": 0.7}
    for name, fraction in at_least.items():
        right = np.mean([words[name] == getattr(scene, name) for words, scene in zip(measured, scenes, strict=True)])
        assert right >= fraction, name


@pytest.fixture(scope="module")
def inputs(trained, tmp_path_factory):
    """Inputs of one pass, and what diffusers predicts with and without the LoRA, loaded from its file."""
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("inputs")
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder(), safety_checker=None).to(dtype=torch.float32)
    ids = pipeline.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([400])

    @torch.no_grad()
    def predict():
        states = pipeline.text_encoder(ids)[0]
        return states, pipeline.unet(latents, timesteps, states).sample

    _, before = predict()
    pipeline.load_lora_weights(str(trained.lora))
    states, after = predict()
    torch.save({"latents": latents, "timesteps": timesteps, "ids": ids, "states": states}, folder / "inputs.pt")
    return folder / "inputs.pt", before, after


def predicted(script, host, trained, inputs, result):
    command = [str(script), str(host), str(model_folder()), str(trained.lora), str(inputs), str(result)]
    done = forks.run(command, [], timeout=300)
    missing = re.search(r"No module named '(\w+)'", done.stdout)
    if missing:
        pytest.skip(f"{host.name} is at {host}, but this Python lacks {missing.group(1)}; run tests/run.sh")
    assert done.returncode == 0, done.stdout
    return torch.load(result)


@pytest.mark.sd_scripts
@pytest.mark.long
def test_sd_scripts_own_network_module_loads_the_lora(trained, inputs, tmp_path):
    host = hosts.sd_scripts()
    file, before, after = inputs
    found = predicted(TESTS / "sd_scripts_host" / "predict.py", host, trained, file, tmp_path / "result.pt")
    assert found["matched"] == 192 + 12
    assert found["told"] == "<All keys matched successfully>"
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(found["prediction"], after, atol=2e-5, rtol=0)


@pytest.mark.comfyui
def test_comfyuis_own_loader_applies_the_lora(trained, inputs, tmp_path):
    host = hosts.comfyui()
    file, before, after = inputs
    found = predicted(TESTS / "comfyui_host" / "predict.py", host, trained, file, tmp_path / "result.pt")
    assert found["matched"] == 192
    assert found["metadata"]["ss_freq_loss_dist_match"] == "0.05"
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(found["prediction"], after, atol=2e-5, rtol=0)


@pytest.mark.sd_scripts
@pytest.mark.long
def test_the_real_sd_scripts_trains_the_toy_model_with_the_engines_toml(trained, tmp_path, monkeypatch):
    host = hosts.sd_scripts()
    monkeypatch.syspath_prepend(str(TESTS / "sd_scripts_host"))
    from runs import SdScripts

    shutil.copytree(model_folder() / "tokenizer", tmp_path / "tokenizers" / "openai_clip-vit-large-patch14")
    values = toml.load(trained.lora.parent / "config.toml")
    sd_scripts = SdScripts(host, tmp_path, model_folder() / "unet" / "config.json")
    written = values["training"] | {"output_dir": str(tmp_path), "output_name": "lora", "max_train_steps": 3}
    run = sd_scripts.train(tmp_path, freq_loss=values["freq_loss"], **written)
    assert run.returncode == 0, run.output
    assert run.lora.keys() == kohya_weights(trained.model.adapted).keys()
    # The model was trained on such images: its loss is far below the 1 of a model that knows nothing.
    assert max(run.scalars["loss/current"]) < 0.5
    assert FreqLossConfig().metadata().keys() <= run.metadata.keys()


@pytest.mark.sd_scripts
@pytest.mark.long
def test_a_single_safetensors_file_is_the_same_model(trained, tmp_path, monkeypatch):
    """Converted by sd-scripts. Its configuration comes from the Hub, which is a cache folder here."""
    host = hosts.sd_scripts()
    file = tmp_path / "tiny.safetensors"
    command = [str(TESTS / "sd_scripts_host" / "convert.py"), str(host), str(model_folder()), str(file)]
    done = forks.run(command, [], timeout=300)
    assert done.returncode == 0, done.stdout
    snapshot = tmp_path / "hub" / "models--stable-diffusion-v1-5--stable-diffusion-v1-5"
    shutil.copytree(model_folder(), snapshot / "snapshots" / "0")
    (snapshot / "refs").mkdir()
    (snapshot / "refs" / "main").write_text("0")
    values = toml.load(trained.lora.parent / "config.toml")["training"]
    values |= {"pretrained_model_name_or_path": str(file), "output_dir": str(tmp_path), "output_name": "single"}
    (tmp_path / "config.toml").write_text(toml.dumps({"training": values, "freq_loss": {"dist_match": 0.05}}))
    environment = {
        **os.environ,
        "PYTHONPATH": str(TESTS.parent),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "freq_loss_plugin", "train", "--config", str(tmp_path / "config.toml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    from safetensors.torch import load_file

    theirs, ours = load_file(tmp_path / "single.safetensors"), load_file(trained.lora)
    assert theirs.keys() == ours.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=1e-4, rtol=1e-3)
