"""What tests of the nodes share: prompts for a real ComfyUI, LoRA files, and ways to run both.

Fixtures are used by giving them a name in the test file: ``sample = comfyui_prompts.sample``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import hosts
import pytest
import torch
from safetensors.torch import load_file

TESTS = Path(__file__).parent
ROOT = TESTS.parent
LORA = "my_frequency_lora.safetensors"
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
BANDS = {"method": "wavelet", "wavelet": "db3", "levels": 2, "cutoff": 0.25}
BAND_INPUTS = ["method", "wavelet", "levels", "cutoff"]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Calls nodes in a ComfyUI without its server; returns their outputs, or "ErrorName: message"."""
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "freq_loss_plugin").symlink_to(ROOT, target_is_directory=True)
    command = [sys.executable, str(TESTS / "comfyui_host" / "execute.py"), str(hosts.comfyui()), str(folder)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)

    def call(*calls):
        file = folder / "calls.pt"
        torch.save(list(calls), file)
        process.stdin.write(f"{file}\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.rstrip("\n") == str(file):
                return torch.load(file)
        raise AssertionError((folder / "log").read_text())

    call.loras = folder / "models" / "loras"
    call.loras.mkdir(parents=True)
    yield call
    process.stdin.close()
    process.wait(timeout=60)
    process.stdout.close()


def in_comfyui(code):
    """Run code inside a real ComfyUI, where ``pack(NAME)`` is a module of nodes/; returns its variable ``answer``."""
    script = TESTS / "comfyui_host" / "inside.py"
    command = [sys.executable, str(script), str(hosts.comfyui()), textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def latent(*shape, dtype=torch.float32, **more):
    return {"samples": torch.randn(shape).to(dtype), **more}


def sampling(model, clip=None, *, steps=4, cfg=3.0, negative="", **more):
    """A prompt that samples with the toy model and saves the latents; ``more`` are further nodes by name."""
    clip = clip or ["checkpoint", 1]
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "positive": node("CLIPTextEncode", clip=clip, text="a red circle in the centre on white with checks"),
        "negative": node("CLIPTextEncode", clip=clip, text=negative),
        "empty": node("EmptyLatentImage", width=128, height=128, batch_size=2),
        "sampler": node(
            "KSampler",
            model=model,
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            seed=5,
            steps=steps,
            cfg=cfg,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "saved": node("SaveLatent", samples=["sampler", 0], filename_prefix="test"),
        **more,
    }


def node(kind, /, **inputs):
    return {"class_type": kind, "inputs": inputs}


def core(strength=1.0, clip=0.0, name=LORA):
    return node(
        "LoraLoader",
        model=["checkpoint", 0],
        clip=["checkpoint", 1],
        lora_name=name,
        strength_model=strength,
        strength_clip=clip,
    )


def loader(strength=1.0, strength_clip=1.0, name=LORA, **more):
    return node(
        "FreqLoss_LoraLoader",
        **{
            "model": ["checkpoint", 0],
            "lora_name": name,
            "strength_model": strength,
            "strength_clip": strength_clip,
            **more,
        },
    )


def gate(low, high, start=0.0, end=1.0, model=("checkpoint", 0), **options):
    return node(
        "FreqLoss_LoraBandGate",
        model=list(model),
        lora_name=LORA,
        low_strength=low,
        high_strength=high,
        start_percent=start,
        end_percent=end,
        **{**BANDS, **options},
    )


@pytest.fixture
def sample(comfyui_server):
    """Runs a prompt; returns the latents that it saved, and what its nodes showed."""

    def run(prompt):
        shown = comfyui_server.run(prompt)
        (entry,) = shown["saved"]["latents"]
        file = comfyui_server.folder / "output" / entry["subfolder"] / entry["filename"]
        return load_file(file)["latent_tensor"], shown

    return run


def other_kind(kind):
    """A LoRA of another kind for two layers of the toy model, one of them a convolution."""

    def values(*shape):
        return torch.randn(shape, generator=generator) * 0.8

    generator = torch.Generator().manual_seed(9)
    linear = "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn1_to_out_0"
    conv = "lora_unet_up_blocks_3_resnets_2_conv2"
    if kind == "loha":
        weights = {}
        for name, inputs in ((linear, 32), (conv, 32 * 9)):
            for part, shape in (("w1_a", (32, 2)), ("w1_b", (2, inputs)), ("w2_a", (32, 2)), ("w2_b", (2, inputs))):
                weights[f"{name}.hada_{part}"] = values(*shape)
        return weights
    if kind == "lokr":
        return {f"{linear}.lokr_w1": values(8, 8), f"{linear}.lokr_w2": values(4, 4)}
    if kind == "tucker":
        return {
            f"{conv}.lora_up.weight": values(32, 4, 1, 1),
            f"{conv}.lora_mid.weight": values(4, 4, 3, 3),
            f"{conv}.lora_down.weight": values(4, 32, 1, 1),
            f"{conv}.alpha": torch.tensor(2.0),
        }
    if kind == "convolution":
        return {
            f"{conv}.lora_up.weight": values(32, 4, 1, 1),
            f"{conv}.lora_down.weight": values(4, 32, 3, 3),
            f"{conv}.alpha": torch.tensor(2.0),
        }
    if kind == "difference":
        return {f"{linear}.diff": values(32, 32), f"{conv}.diff_b": values(32)}
    plain = {f"{linear}.lora_up.weight": values(32, 4), f"{linear}.lora_down.weight": values(4, 32)}
    return {**plain, f"{linear}.dora_scale": values(32, 1).abs()} if kind == "dora" else plain


def sdxl_lora():
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    return {
        f"{name}.lora_down.weight": torch.randn(4, 640),
        f"{name}.lora_up.weight": torch.randn(640, 4),
        f"{name}.alpha": torch.tensor(4.0),
    }
