"""The metadata of LoRA files, and the errors for files that are none."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.guidance_token import features as guidance
from freq_loss_plugin.lora.metadata import LoraFileError, mismatch_reason, module_of, read_lora

ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def kohya(width=768, rank=4, modules=(ATTENTION, TEXT), dtype=torch.float32):
    weights = {}
    for name in modules:
        weights[f"{name}.lora_down.weight"] = torch.zeros(rank, width, dtype=dtype)
        weights[f"{name}.lora_up.weight"] = torch.zeros(320, rank, dtype=dtype)
        weights[f"{name}.alpha"] = torch.tensor(float(rank))
    return weights


# These names do not reveal the base model.
NAMELESS = kohya(width=64, modules=["lora_unet_double_blocks_0_img_attn_qkv"])


@pytest.fixture
def written(tmp_path):
    def write(weights=None, metadata=None, name="lora.safetensors"):
        save_file(kohya() if weights is None else weights, tmp_path / name, metadata)
        return tmp_path / name

    return write


def test_the_description_of_a_file_of_this_project(written):
    loss = FreqLossConfig(dist_match=0.05, method="fft")
    tags = json.dumps({"10_a": {"red fox": 30, "snow": 2}, "5_b": {" red fox": 1}})
    metadata = {
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": "D:\\models\\base.safetensors",
        "ss_network_module": "networks.lora",
        "ss_network_alpha": "4.0",
        "ss_steps": "1200",
        "ss_resolution": "(512, 512)",
        "ss_learning_rate": "0.0001",
        "ss_tag_frequency": tags,
        **loss.file_metadata("networks.lora"),
    }
    lora = read_lora(written(metadata=metadata))
    assert lora.base_model == "SD1.x"
    assert lora.ranks == (4,)
    assert set(lora.modules) == {ATTENTION, TEXT}
    assert lora.text_encoder_modules == (TEXT,)
    assert lora.has_frequency_loss
    assert not lora.has_guidance_token
    assert lora.trained_words() == [("red fox", 31), ("snow", 2)]
    rows = dict(line.split(": ", 1) for line in lora.describe().splitlines())
    assert rows["base model"] == "SD1.x, ss_base_model_version sd_v1, trained on base.safetensors"
    assert rows["network"] == "networks.lora, rank 4, alpha 4.0, 1 of the diffusion model, 1 of the text encoder"
    assert rows["training"] == "1200 steps, resolution (512, 512), learning rate 0.0001"
    assert rows["trained words"] == "red fox (31), snow (2)"
    assert rows["frequency loss"].startswith("dist_match 0.05, resolved_method fft, low_weight 0.7, high_weight 0.3")
    for option, value in (("levels", 2), ("timesteps", "unified"), ("min_timestep", 200), ("reduction", "sum")):
        assert f"{option} {value}" in rows["frequency loss"]


def test_the_description_of_a_file_without_metadata(written):
    rows = dict(line.split(": ", 1) for line in read_lora(written()).describe().splitlines())
    assert rows["base model"] == "SD1.x"
    assert rows["frequency loss"] == "no: trained without it"
    assert rows["training"] == rows["trained words"] == "not in the metadata"


@pytest.mark.parametrize(
    ("metadata", "weights", "family"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, kohya(), "SDXL"),
        ({"ss_base_model_version": "sd_v2_v"}, kohya(), "SD2.x"),
        ({"ss_base_model_version": "sd_1.5"}, kohya(width=64), "SD1.x"),
        ({"ss_base_model_version": "flux1"}, kohya(), "FLUX.1"),
        ({"ss_base_model_version": "flux"}, NAMELESS, "FLUX.1"),
        ({"ss_base_model_version": "flux.1"}, NAMELESS, "FLUX.1"),
        ({"ss_base_model_version": "flux_kontext"}, NAMELESS, "FLUX.1"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, NAMELESS, "FLUX.1"),
        ({"modelspec.architecture": "Flux.1-schnell/lora"}, NAMELESS, "FLUX.1"),
        ({"ss_base_model_version": "flux2-dev"}, NAMELESS, "FLUX.2"),
        ({"ss_base_model_version": "flux2_klein_4b"}, NAMELESS, "FLUX.2"),
        ({"ss_base_model_version": "flux_2_dev"}, NAMELESS, "FLUX.2"),
        ({"modelspec.architecture": "flux-2-dev/lora"}, NAMELESS, "FLUX.2"),
        ({"ss_base_model_version": "flux3"}, NAMELESS, None),
        ({"ss_base_model_version": "flux-dev-2"}, NAMELESS, None),
        ({"ss_base_model_version": "chroma"}, NAMELESS, "Chroma"),
        ({"ss_base_model_version": "chroma_radiance"}, NAMELESS, None),
        ({"modelspec.architecture": "lumina-2/lora"}, NAMELESS, "Lumina 2"),
        ({"ss_base_model_version": "lumina_next"}, NAMELESS, None),
        ({"ss_base_model_version": "z_image"}, NAMELESS, "Z-Image"),
        ({"ss_base_model_version": "zimage"}, NAMELESS, "Z-Image"),
        ({"modelspec.architecture": "hunyuan-image-2.1/lora"}, NAMELESS, "HunyuanImage 2.1"),
        ({"ss_base_model_version": "hunyuan_video"}, NAMELESS, None),
        ({"ss_base_model_version": "anima-preview"}, NAMELESS, "Anima"),
        ({"ss_base_model_version": "animatediff"}, NAMELESS, None),
        ({"modelspec.architecture": "stable-diffusion-3-m/lora"}, kohya(), "SD3"),
        ({"ss_base_model_version": "something new"}, kohya(), "SD1.x"),
        (None, kohya(width=1024), "SD2.x"),
        (None, kohya(width=2048), "SDXL"),
        (None, kohya(width=64), None),
        (None, kohya(modules=["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"]), "SDXL"),
        (None, kohya(modules=["lora_unet_joint_blocks_0_x_block_attn_qkv"]), "SD3"),
        (None, kohya(modules=["lora_unet_double_blocks_0_img_attn_qkv"]), None),
    ],
    ids=lambda value: "weights" if "alpha" in str(value) else str(value),
)
def test_base_models(written, metadata, weights, family):
    assert read_lora(written(weights, metadata)).base_model == family


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("lora_unet_a.lora_down.weight", "lora_unet_a"),
        ("lora_unet_a.alpha", "lora_unet_a"),
        ("unet.a.to_k.lora_A.weight", "unet.a.to_k"),
        ("transformer.b.lora_B.default.weight", "transformer.b"),
        ("unet.a.processor.to_k_lora.up.weight", "unet.a.processor.to_k"),
        ("text_encoder.c.lora_linear_layer.down.weight", "text_encoder.c"),
        ("lora_unet_a.hada_w1_a", "lora_unet_a"),
        ("lora_unet_a.hada_t2", "lora_unet_a"),
        ("lora_unet_a.lokr_w1", "lora_unet_a"),
        ("lora_unet_a.lokr_w2_b", "lora_unet_a"),
        ("lora_unet_a.diff_b", "lora_unet_a"),
        ("lora_unet_a.dora_scale", "lora_unet_a"),
        ("lora_unet_a.lora_magnitude_vector", "lora_unet_a"),
        ("unet.a.lora_magnitude_vector.default.weight", "unet.a"),
        ("bundle_emb.word.clip_l", None),
        ("model.diffusion_model.input_blocks.0.0.weight", None),
        ("first_stage_model.decoder.conv_in.bias", None),
    ],
)
def test_the_module_of_a_tensor(key, module):
    assert module_of(key) == module


@pytest.mark.parametrize(
    ("value", "on"), [("8.0", True), ("True", True), ("0", False), ("0.0", False), ("False", False), (None, False)]
)
def test_the_guidance_token_is_described_only_where_it_is_on(written, value, on):
    lora = read_lora(written(metadata={guidance.KEY: value} if value else None))
    assert lora.has_guidance_token == on
    assert ("guidance token: yes" in lora.describe()) == on


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 5}', '{"a": {"b": "many"}}', '"x"', "null"])
def test_malformed_metadata_is_ignored(written, text):
    assert read_lora(written(metadata={"ss_tag_frequency": text})).trained_words() == []


def test_whole_captions_are_shortened(written):
    caption = "a very long caption without a single comma " * 5
    lora = read_lora(written(metadata={"ss_tag_frequency": json.dumps({"a": {caption: 1}})}))
    assert max(map(len, lora.describe().splitlines())) < 120


def header(content, length=None):
    return struct.pack("<Q", len(content) if length is None else length) + content


def good(tmp_path):
    save_file(kohya(), tmp_path / "good.safetensors")
    return (tmp_path / "good.safetensors").read_bytes()


BAD = {
    "empty": (lambda _: b"", "is empty (0 bytes)"),
    "eight bytes": (lambda _: b"12345678", "has 8 bytes: expected a safetensors file"),
    "pickle": (lambda _: pickle.dumps({"lora": 1}), "is a PyTorch pickle under another name"),
    "text": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is not a safetensors file"),
    "web page": (lambda _: b"<!DOCTYPE html><html>not found</html>", "it looks like a web page"),
    "giant header": (lambda _: header(b"{}", 2**60) + b" " * 50, "at most 100,000,000 bytes"),
    "long header": (lambda _: header(b"{}", 90_000_000), "is truncated: its header alone has 90,000,000 bytes"),
    "header that is no JSON": (lambda _: header(b"{" + b"x" * 40), "is damaged or incomplete"),
    "cut in the header": (lambda folder: good(folder)[:60], "is truncated: its header alone"),
    "cut in the weights": (lambda folder: good(folder)[:-400], "is damaged or incomplete"),
    "longer than it says": (lambda folder: good(folder) + b"\0" * 7, "is damaged or incomplete"),
    "offsets beyond the end": (
        lambda _: header(json.dumps({"a.alpha": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()),
        "is damaged or incomplete",
    ),
    "unknown dtype": (
        lambda _: header(json.dumps({"a.alpha": {"dtype": "X9", "shape": [], "data_offsets": [0, 0]}}).encode()),
        "is damaged or incomplete",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_files_that_are_no_lora_are_named_for_what_they_are(tmp_path, kind):
    make, words = BAD[kind]
    file = tmp_path / "bad.safetensors"
    file.write_bytes(make(tmp_path))
    with pytest.raises(LoraFileError) as caught:
        read_lora(file)
    assert str(caught.value).startswith("bad.safetensors ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_torchs_zip_is_a_pickle_too(tmp_path):
    file = tmp_path / "zip.safetensors"
    torch.save({"a": torch.zeros(1)}, file)
    assert zipfile.is_zipfile(file)
    with pytest.raises(LoraFileError, match=r"PyTorch pickle.*get the LoRA as \.safetensors"):
        read_lora(file)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(LoraFileError, match=r"nowhere\.safetensors cannot be read: No such file"):
        read_lora(tmp_path / "nowhere.safetensors")
    with pytest.raises(LoraFileError, match="cannot be read: Is a directory"):
        read_lora(tmp_path)


def test_a_whole_model_is_refused(written):
    weights = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4), "x.bias": torch.zeros(4)}
    with pytest.raises(LoraFileError, match=r"contains no LoRA: none of its 2 tensors .*input_blocks"):
        read_lora(written(weights))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool], ids=str)
def test_weights_that_are_no_floating_point_numbers(written, dtype):
    with pytest.raises(LoraFileError, match=r"lora_down\.weight has dtype (I8|I64|BOOL); expected floating point"):
        read_lora(written(kohya(dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_every_floating_point_type_is_read(written, dtype):
    assert len(read_lora(written(kohya(dtype=dtype))).modules) == 2


def test_likely_reasons(written):
    lora = read_lora(written(metadata={"ss_base_model_version": "sdxl_base_v1-0"}))
    assert mismatch_reason(lora, "SD1.x", []) == "it was trained on SDXL, and this model is SD1.x"
    assert "other sizes here" in mismatch_reason(lora, "SDXL", ["a"])
    assert "not part of this model" in mismatch_reason(lora, None, [])
