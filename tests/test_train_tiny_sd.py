"""The script that trains the embedded model: its parts, and every stage for a few steps."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import Linear

from freq_loss_plugin.embedded.pictures import CAPTIONED, draw, random_scene
from freq_loss_plugin.engine.extraction import Clip

for needed in ("diffusers", "transformers"):
    pytest.importorskip(needed)

pytestmark = pytest.mark.filterwarnings("default")  # diffusers' and transformers' own

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parent.parent / "assets" / "train_tiny_sd.py"
    spec = importlib.util.spec_from_file_location("train_tiny_sd", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_topology_is_that_of_sd15(script):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    def names(model):
        return {name for name, _ in model.named_parameters()}

    # diffusers' defaults for the UNet are SD1.5's; SD's autoencoder has four levels of two layers.
    assert names(script.make_unet()) == names(UNet2DConditionModel(block_out_channels=(32, 64, 64, 64)))
    assert len(script.make_unet().down_blocks) == 4
    widths = {"block_out_channels": (32,) * 4, "latent_channels": 4, "layers_per_block": 2}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    levels = names(AutoencoderKL(**widths, **blocks))
    assert {n for n in names(script.make_vae()) if "shortcut" not in n} == {n for n in levels if "shortcut" not in n}


def test_every_word_of_a_caption_is_one_token_and_any_other_text_survives(script, tmp_path):
    tokenizer = script.make_tokenizer(tmp_path)
    generator = np.random.default_rng(3)
    for _ in range(50):
        caption = random_scene(generator).caption()
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2
    assert tokenizer.unk_token_id not in tokenizer("zebra, 7!").input_ids[1:-1]
    assert tokenizer.decode(tokenizer("a zebra").input_ids, skip_special_tokens=True) == "a zebra"
    assert tokenizer("x", padding="max_length").input_ids[-1] == tokenizer.eos_token_id


def test_rescaling_gives_unit_variance_and_changes_no_picture(script):
    torch.manual_seed(0)
    vae = script.make_vae()
    pixels = script.to_tensor([draw(random_scene(np.random.default_rng(i))) for i in range(2)])
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        script.fit_scaling_factor(vae, CPU)
        after = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        generator = np.random.default_rng(script.TRAINING)
        base = script.to_tensor([draw(random_scene(generator)) for _ in range(64)])
        spread = (vae.encode(base).latent_dist.sample() * script.SCALING_FACTOR).std()
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)
    assert spread == pytest.approx(1, abs=0.05)


def stage_of(script, file, steps=8):
    torch.manual_seed(0)
    return script.Stage(file, {"line": Linear(4, 4)}, steps, 0.1)


class KilledError(Exception):
    pass


def run(stage, until):
    """Train, and be killed when step ``until`` is to be made."""
    model = stage.modules["line"]

    def loss_of_step(step):
        if step == until:
            raise KilledError
        return {"loss": model(torch.randn(8, 4)).square().mean()}

    with contextlib.suppress(KilledError):
        stage.run(loss_of_step, decay=0.9)


def test_an_interrupted_stage_ends_where_an_uninterrupted_one_does(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SAVE_EVERY", 2)
    whole = stage_of(script, tmp_path / "whole.pt")
    run(whole, 8)
    run(stage_of(script, tmp_path / "parts.pt"), 5)
    rest = stage_of(script, tmp_path / "parts.pt")
    assert rest.step == 4
    run(rest, 8)
    for ours, theirs in zip(whole.modules["line"].parameters(), rest.modules["line"].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(whole.average["line"], rest.average["line"], strict=True):
        assert torch.equal(ours, theirs)


def test_a_failed_save_leaves_the_last_state_whole(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SAVE_EVERY", 2)
    stage = stage_of(script, tmp_path / "state.pt")
    run(stage, 3)
    before = (tmp_path / "state.pt").read_bytes()

    def full_disk(state, file):
        Path(file).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        stage.save()
    assert (tmp_path / "state.pt").read_bytes() == before


def test_all_stages_in_order(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "OUTPUT", tmp_path / "tiny_sd")
    options = argparse.Namespace(work=tmp_path / "work", steps=2, pictures=32, samples=2)
    with pytest.raises(SystemExit, match="run the stage vae first"):
        script.train_unet(options, CPU)
    script.train_vae(options, CPU)
    with pytest.raises(SystemExit, match="run the stages vae and unet first"):
        script.evaluate(options, CPU)
    script.train_unet(options, CPU)
    script.evaluate(options, CPU)
    script.train_clip(options, CPU)
    told = capsys.readouterr().out
    assert "held-out PSNR" in told
    for name in CAPTIONED:
        assert told.count(f"{name} ") == 2
    clip = Clip(str(tmp_path / "tiny_sd" / "image_encoder"), CPU)
    features = clip([Image.new("RGB", (200, 128), colour) for colour in ("red", "blue")])
    assert features.shape == (2, script.TEXT_WIDTH)
    assert not torch.allclose(features[0], features[1])

    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "tiny_sd", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", height=128, width=128, num_inference_steps=2).images[0].size == (128, 128)
    assert sum(file.stat().st_size for file in (tmp_path / "tiny_sd").rglob("*") if file.is_file()) < 16e6
