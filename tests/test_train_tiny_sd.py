"""The training of the toy model: its parts, and every stage for a few steps."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import Linear

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("more_itertools")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "assets"))

from make_tiny_sd import architecture, autoencoder, evaluation, image_encoder, images, stage, tokenizer, unet

from freq_loss_plugin.guidance_token.extract import Clip
from freq_loss_plugin.toy_model import model_folder
from freq_loss_plugin.toy_model.scenes import CAPTIONED, random_scene

pytestmark = pytest.mark.filterwarnings("default")  # diffusers' and transformers' own

CPU = torch.device("cpu")


def test_the_topology_is_that_of_sd15():
    from diffusers import AutoencoderKL, UNet2DConditionModel

    def names(model):
        return {name for name, _ in model.named_parameters()}

    # diffusers' defaults for the UNet are SD1.5's; SD's autoencoder has four levels of two layers.
    assert names(architecture.make_unet()) == names(UNet2DConditionModel(block_out_channels=(32, 64, 64, 64)))
    assert len(architecture.make_unet().down_blocks) == 4
    widths = {"block_out_channels": (32,) * 4, "latent_channels": 4, "layers_per_block": 2}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    levels = names(AutoencoderKL(**widths, **blocks))
    assert {n for n in names(architecture.make_vae()) if "shortcut" not in n} == {
        n for n in levels if "shortcut" not in n
    }


def test_every_word_of_a_caption_is_one_token_and_any_other_text_survives(tmp_path):
    trained = tokenizer.load_or_make_tokenizer(tmp_path)
    generator = np.random.default_rng(3)
    for _ in range(50):
        caption = random_scene(generator).caption()
        assert len(trained(caption).input_ids) == len(caption.split()) + 2
    assert trained.unk_token_id not in trained("zebra, 7!").input_ids[1:-1]
    assert trained.decode(trained("a zebra").input_ids, skip_special_tokens=True) == "a zebra"
    assert trained("x", padding="max_length").input_ids[-1] == trained.eos_token_id
    assert trained.eos_token_id == max(trained.get_vocab().values()) == len(trained) - 1
    # The trainer numbers tokens anew every time, so a second call has to read the files.
    assert tokenizer.load_or_make_tokenizer(tmp_path).get_vocab() == trained.get_vocab()


def test_rescaling_gives_unit_variance_and_changes_no_image():
    torch.manual_seed(0)
    vae = architecture.make_vae()
    pixels = images.draw_all(images.random_scenes(0, 2))
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        autoencoder.fit_scaling_factor(vae, CPU)
        after = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        base = images.draw_all(images.random_scenes(images.TRAINING, 64))
        deviation = (vae.encode(base).latent_dist.sample() * architecture.SCALING_FACTOR).std()
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)
    assert deviation == pytest.approx(1, abs=0.05)


def new_stage(file, steps=8):
    torch.manual_seed(0)
    return stage.Stage(file, {"line": Linear(4, 4)}, steps, rate=0.1, decay=0.9)


class KilledError(Exception):
    pass


def run(training, until):
    """Train, and be killed when step ``until`` begins."""
    model = training.modules["line"]

    def loss_of_step(step):
        if step == until:
            raise KilledError
        return {"loss": model(torch.randn(8, 4)).square().mean()}

    with contextlib.suppress(KilledError):
        training.run(loss_of_step)


def test_an_interrupted_stage_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "SAVE_EVERY", 2)
    whole = new_stage(tmp_path / "whole.pt")
    start = [parameter.clone() for parameter in whole.modules["line"].parameters()]
    run(whole, 8)
    run(new_stage(tmp_path / "parts.pt"), 5)
    rest = new_stage(tmp_path / "parts.pt")
    assert rest.step == 4
    run(rest, 8)
    parameters = [list(training.modules["line"].parameters()) for training in (whole, rest)]
    for before, one, other in zip(start, *parameters, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, before)


def test_a_failed_save_leaves_the_last_state_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "SAVE_EVERY", 2)
    training = new_stage(tmp_path / "state.pt")
    run(training, 3)
    before = (tmp_path / "state.pt").read_bytes()

    def full_disk(state, file):
        Path(file).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        training.save()
    assert (tmp_path / "state.pt").read_bytes() == before


def test_the_learning_rate_rises_and_falls_to_0(tmp_path):
    """AdamW moves a bias of constant gradient by the learning rate."""
    training = new_stage(tmp_path / "state.pt", steps=100)
    bias, moves = training.modules["line"].bias, []

    def loss_of_step(step):
        moves.append(bias.detach().clone())
        return {"loss": bias.sum() + 0 * training.modules["line"].weight.sum()}

    training.run(loss_of_step)
    lengths = torch.stack(moves).diff(dim=0).norm(dim=1)
    assert lengths.argmax() == stage.WARMUP
    assert lengths[0] == 0
    assert lengths[-1] < 0.05 * lengths.max()


def test_all_stages_in_order(tmp_path, capsys):
    output = tmp_path / "tiny_sd"
    options = argparse.Namespace(output=output, work=tmp_path / "work", steps=2, images=32, samples=2, start=None)
    with pytest.raises(SystemExit, match="run the stage vae first"):
        unet.train_unet(options, CPU)
    autoencoder.train_vae(options, CPU)
    with pytest.raises(SystemExit, match="run the stages vae and unet first"):
        evaluation.evaluate(options, CPU)
    unet.train_unet(options, CPU)
    evaluation.evaluate(options, CPU)
    image_encoder.train_clip(options, CPU)
    printed = capsys.readouterr().out
    assert "validation PSNR" in printed
    for name in CAPTIONED:
        assert printed.count(f"{name} ") == 2
    with Image.open(output / "samples.png") as sheet:
        assert sheet.size == (2 * 128, 2 * 128)
    clip = Clip(str(output / "image_encoder"), CPU)
    features = clip([Image.new("RGB", (200, 128), color) for color in ("red", "blue")])
    assert features.shape == (2, architecture.TEXT_WIDTH)
    assert not torch.allclose(features[0], features[1])

    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(output).to(dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", height=128, width=128, num_inference_steps=2).images[0].size == (128, 128)
    assert sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) < 16e6


def test_a_unet_goes_on_from_a_finished_model(tmp_path, monkeypatch):
    output = tmp_path / "tiny_sd"
    shutil.copytree(model_folder(), output)
    options = argparse.Namespace(output=output, work=tmp_path, steps=1, images=16, samples=0, start=model_folder())
    monkeypatch.setattr(stage, "WARMUP", 10**6)  # the first step moves nothing
    unet.train_unet(options, CPU)
    for part in ("unet", "text_encoder"):
        (before,) = (model_folder() / part).glob("*.safetensors")
        (after,) = (output / part).glob("*.safetensors")
        shipped, saved = load_file(before), load_file(after)
        assert shipped.keys() == saved.keys()
        for name, tensor in shipped.items():
            torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-3)


def test_the_command_names_the_stages_that_come_first(tmp_path):
    script = Path(images.__file__).parents[1] / "train_tiny_sd.py"
    command = [sys.executable, str(script), "evaluate", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert f"no model in {tmp_path}: run the stages vae and unet first" in done.stderr
