"""LoRAs on models with quantized weights: the formats of ComfyUI 0.33, GGUF and NF4."""

from __future__ import annotations

import shutil
import subprocess
import sys

import comfyui_prompts
import hosts
import pytest
import torch
from comfyui_prompts import CHECKPOINT, TESTS, core, gate, loader, node, other_kind, sampling
from safetensors.torch import save_file

pytestmark = [pytest.mark.comfyui, pytest.mark.filterwarnings("default")]

sample = comfyui_prompts.sample


@pytest.fixture(scope="module")
def quantized(comfyui_server):
    """Makes checkpoints of a format; the names of the quantized one and of the one with the same values unpacked."""
    if not (hosts.comfyui() / "comfy" / "quant_ops.py").is_file():
        pytest.skip("this ComfyUI knows no quantized checkpoints")
    folder = comfyui_server.folder / "models" / "checkpoints"

    def make(kind):
        names = (f"{kind}.safetensors", f"{kind}-unpacked.safetensors")
        if not (folder / names[0]).exists():
            command = [sys.executable, str(TESTS / "comfyui_host" / "quantize.py"), str(hosts.comfyui())]
            files = [str(folder / name) for name in names]
            subprocess.run([*command, str(folder / CHECKPOINT), kind, *files], check=True, capture_output=True)
        return names

    return make


def on(checkpoint, prompt):
    """The prompt with another checkpoint."""
    prompt["checkpoint"]["inputs"]["ckpt_name"] = checkpoint
    return prompt


@pytest.mark.parametrize("kind", ["nvfp4", "float8_e4m3fn", "int8_tensorwise"])
def test_the_loader_is_cores_on_quantized_layers(sample, quantized, kind):
    checkpoint, _ = quantized(kind)
    expected, _ = sample(on(checkpoint, sampling(["lora", 0], lora=core(1.0))))
    made, shown = sample(on(checkpoint, sampling(["lora", 0], lora=loader(1.0))))
    assert torch.equal(made, expected)
    (text,) = shown["lora"]["text"]
    assert text.startswith("applied: 192 of 192 modules; 12 of the text encoder are skipped")
    assert "WARNING" not in text


@pytest.mark.parametrize("kind", ["nvfp4", "float8_e4m3fn", "int8_tensorwise"])
def test_a_gate_on_quantized_layers_is_that_on_their_values(sample, quantized, kind):
    checkpoint, unpacked = quantized(kind)
    bare, _ = sample(on(checkpoint, sampling(["checkpoint", 0], steps=1)))
    without, _ = sample(on(unpacked, sampling(["checkpoint", 0], steps=1)))
    # In INT8 ComfyUI quantizes the input of a layer, too.
    error = max(2 * (bare - without).abs().mean(), 1e-3)
    for low, high in ((1.0, 0.0), (0.5, 1.0)):
        expected, _ = sample(on(unpacked, sampling(["gate", 0], steps=1, gate=gate(low, high))))
        made, shown = sample(on(checkpoint, sampling(["gate", 0], steps=1, gate=gate(low, high))))
        assert shown["gate"]["text"][0].startswith("applied: 192 of 192 modules")
        assert (made - expected).abs().mean() < error < (made - bare).abs().mean()


def test_layers_that_are_computed_without_being_called_are_refused(comfyui_server, sample, quantized):
    from server import PromptError

    checkpoint, unpacked = quantized("int8_tensorwise")
    fused = node("TinySD_FuseActivations", model=["checkpoint", 0])
    prompt = sampling(["gate", 0], steps=1, fused=fused, gate=gate(1.0, 0.0, model=["fused", 0]))
    with pytest.raises(PromptError, match=r"computes 16 of the 192 layers that the LoRA adapts in INT8 together with"):
        comfyui_server.run(on(checkpoint, prompt))
    sample(on(unpacked, prompt))


@pytest.fixture
def packed(comfyui_server, request):
    """A copy of the checkpoint, since the layers of the loaded model are exchanged."""
    folder = comfyui_server.folder / "models" / "checkpoints"
    shutil.copy(folder / CHECKPOINT, folder / f"{request.param}.safetensors")
    return request.param


@pytest.mark.parametrize("packed", ["gguf", "nf4"], indirect=True)
def test_layers_of_other_packs_fit_by_their_own_shape(comfyui_server, sample, packed):
    exchanged = node("TinySD_Pack", model=["checkpoint", 0], kind=packed)
    expected, _ = sample(sampling(["gate", 0], steps=2, gate=gate(1.0, 0.5)))
    gated = sampling(["gate", 0], steps=2, exchanged=exchanged, gate=gate(1.0, 0.5, model=["exchanged", 0]))
    made, shown = sample(on(f"{packed}.safetensors", gated))
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    assert shown["gate"]["text"][0].startswith("applied: 192 of 192 modules")
    alone = {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=f"{packed}.safetensors"),
        "exchanged": exchanged,
        "lora": loader(model=["exchanged", 0]),
        "shown": node("TinySD_Attachments", model=["lora", 0]),
    }
    shown = comfyui_server.run(alone)
    assert shown["lora"]["text"][0].startswith("applied: 192 of 192 modules")


@pytest.mark.parametrize("packed", ["unknown"], indirect=True)
def test_layers_of_an_unknown_format_are_left_to_core_and_not_gated(comfyui_server, packed):
    from server import PromptError

    exchanged = node("TinySD_Pack", model=["checkpoint", 0], kind=packed)
    checkpoint = node("CheckpointLoaderSimple", ckpt_name=f"{packed}.safetensors")
    prompt = {"checkpoint": checkpoint, "exchanged": exchanged, "shown": node("TinySD_Attachments", model=["lora", 0])}
    shown = comfyui_server.run({**prompt, "lora": loader(model=["exchanged", 0])})
    assert shown["lora"]["text"][0].startswith("applied: 192 of 192 modules")
    with pytest.raises(
        PromptError, match=r"cannot be gated: the weight of the layer \S+ is packed in an unknown format"
    ):
        comfyui_server.run({**prompt, "lora": gate(1.0, 0.0, model=["exchanged", 0])})


@pytest.mark.parametrize("packed", ["gguf"], indirect=True)
def test_modules_of_another_size_do_not_fit_packed_layers(comfyui_server, packed):
    lora, wrong = other_kind("plain"), "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    lora |= {f"{wrong}.lora_up.weight": torch.randn(640, 4), f"{wrong}.lora_down.weight": torch.randn(4, 640)}
    save_file(lora, comfyui_server.folder / "models" / "loras" / "mixed_sizes.safetensors")
    prompt = {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=f"{packed}.safetensors"),
        "exchanged": node("TinySD_Pack", model=["checkpoint", 0], kind=packed),
        "lora": loader(name="mixed_sizes.safetensors", model=["exchanged", 0]),
        "shown": node("TinySD_Attachments", model=["lora", 0]),
    }
    shown = comfyui_server.run(prompt)
    assert shown["lora"]["text"][0].startswith("WARNING: only 1 of 2 modules fit; likely reason: the layers have other")
