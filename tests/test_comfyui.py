"""The nodes in a real ComfyUI: what they return, what they show, and what they say about bad input."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import hosts
import pytest
import torch
from safetensors.torch import load_file, save_file

from freq_loss_plugin import FreqLossConfig, frequency_matching_loss
from freq_loss_plugin.shaping import merge_bands, scale_bands, split_bands
from freq_loss_plugin.spectra import compare_spectra

pytestmark = [pytest.mark.host, pytest.mark.filterwarnings("default")]

TESTS = Path(__file__).parent
ROOT = TESTS.parent
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
LORA = "my_frequency_lora.safetensors"

BANDS = {"method": "wavelet", "wavelet": "db3", "levels": 2, "cutoff": 0.25}
BAND_INPUTS = ["method", "wavelet", "levels", "cutoff"]
# Ids and inputs are in everyone's workflows: this table changes only by addition, and an addition is optional.
FROZEN = {
    "FreqLoss_BandSplit": (["samples", *BAND_INPUTS], ["latent_format"], ["LATENT", "LATENT", "IMAGE"]),
    "FreqLoss_BandMerge": (["low", "high", "low_gain", "high_gain"], [], ["LATENT"]),
    "FreqLoss_BandPreview": (
        ["source", *BAND_INPUTS, "latent_format", "frame", "panel_size"],
        ["vae"],
        ["IMAGE"],
    ),
    "FreqLoss_SpectrumCompare": (["a", "b", *BAND_INPUTS], [], ["IMAGE", "STRING", "FLOAT"]),
    "FreqLoss_BandLoss": (
        [
            "prediction",
            "target",
            *BAND_INPUTS,
            "low_weight",
            "high_weight",
            "dist_match",
            "reduction",
            "latent_format",
        ],
        [],
        ["FLOAT", "FLOAT", "FLOAT", "IMAGE"],
    ),
    "FreqLoss_LoraLoader": (
        ["model", "lora_name", "strength_model", "strength_clip"],
        ["clip"],
        ["MODEL", "CLIP", "STRING"],
    ),
    "FreqLoss_BandOperation": (["low_gain", "high_gain", *BAND_INPUTS], [], ["LATENT_OPERATION"]),
    "FreqLoss_LoraBandGate": (
        ["model", "lora_name", "low_strength", "high_strength", "start_percent", "end_percent", *BAND_INPUTS],
        [],
        ["MODEL"],
    ),
    "FreqLoss_GuidanceToken": (["conditioning", "lora_name", "strength"], ["image"], ["CONDITIONING"]),
}


@pytest.fixture(scope="module")
def object_info(comfyui_server):
    return comfyui_server.get("/object_info")


# -- what there is ----------------------------------------------------------------------------------------------------


def test_every_node_is_there_with_the_inputs_that_workflows_rely_on(object_info):
    ours = {name: info for name, info in object_info.items() if name.startswith("FreqLoss")}
    assert ours.keys() == FROZEN.keys()
    for name, (required, optional, outputs) in FROZEN.items():
        info = ours[name]
        assert list(info["input"]["required"]) == required, name
        assert list(info["input"].get("optional", {})) == optional, name
        assert info["output"] == outputs, name
        assert info["category"] == "FreqLoss"
        assert info["python_module"] == "custom_nodes.freq_loss_plugin"


def test_every_input_and_output_has_a_tooltip_and_every_node_a_description(object_info):
    for name in FROZEN:
        info = object_info[name]
        assert info["description"]
        for kind in ("required", "optional"):
            for _, options in info["input"].get(kind, {}).values():
                assert options["tooltip"].endswith("."), name
        assert all(tooltip.endswith(".") for tooltip in info["output_tooltips"])


def test_the_defaults_of_the_nodes_are_those_of_the_loss(object_info):
    default = FreqLossConfig()
    for name in FROZEN:
        for option, (_, given) in object_info[name]["input"]["required"].items():
            if option in (
                "method",
                "wavelet",
                "levels",
                "cutoff",
                "low_weight",
                "high_weight",
                "dist_match",
                "reduction",
            ):
                assert given["default"] == getattr(default, option), (name, option)


def test_every_wavelet_can_be_chosen(object_info):
    from freq_loss_plugin.wavelet_library import discrete_wavelets

    _, options = object_info["FreqLoss_BandSplit"]["input"]["required"]["wavelet"]
    assert tuple(options["options"]) == discrete_wavelets()


# -- tensors: the nodes called in ComfyUI, without the server ---------------------------------------------------------


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Calls nodes in a ComfyUI without its server; what they return, or "ErrorName: message"."""
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


def latent(*shape, dtype=torch.float32, **more):
    return {"samples": torch.randn(shape).to(dtype), **more}


LATENTS = {
    "SD, with a mask": latent(2, 4, 16, 24, noise_mask=torch.rand(2, 1, 16, 24), batch_index=[3, 4]),
    "FLUX, half": latent(1, 16, 8, 8, dtype=torch.float16),
    "bfloat16": latent(1, 4, 8, 8, dtype=torch.bfloat16),
    "video": latent(1, 16, 5, 13, 8),
    "odd": latent(3, 4, 17, 5),
    "channels of no known format": latent(1, 7, 8, 8),
    "as small as levels allow": latent(1, 4, 4, 4),
}


@pytest.mark.parametrize("options", [BANDS, {**BANDS, "method": "fft", "cutoff": 0.1}], ids=["wavelet", "fft"])
def test_split_and_merge_are_the_functions_and_keep_what_the_latent_holds(nodes, options):
    split = nodes(*(("FreqLoss_BandSplit", {"samples": given, **options}) for given in LATENTS.values()))
    merged = nodes(
        *(
            ("FreqLoss_BandMerge", {"low": low, "high": high, "low_gain": 1.0, "high_gain": 1.0})
            for low, high, _ in split
        )
    )
    config = FreqLossConfig(**options)
    for (name, given), (low, high, strip), (back,) in zip(LATENTS.items(), split, merged, strict=True):
        expected = split_bands(given["samples"], config)
        assert torch.equal(low["samples"], expected.low), name
        assert torch.equal(high["samples"], expected.high), name
        loose = {torch.float16: 4e-3, torch.bfloat16: 4e-2}.get(given["samples"].dtype, 1e-5)
        torch.testing.assert_close(back["samples"], given["samples"], atol=loose, rtol=0, msg=name)
        for made in (low, high, back):
            assert made.keys() == given.keys(), name
            for key in given.keys() - {"samples"}:
                assert made[key] is not None
                assert torch.equal(torch.as_tensor(made[key]), torch.as_tensor(given[key])), name
        height, width = given["samples"].shape[-2:]
        assert strip.shape == (len(given["samples"]), height, 3 * width, 3), name
        assert 0 <= strip.min() <= strip.max() <= 1, name


def test_merging_with_gains_and_with_one_band_for_a_whole_batch(nodes):
    low, high = latent(3, 4, 8, 8), latent(1, 4, 8, 8, noise_mask=torch.ones(1, 8, 8))
    gained, broadcast, refused = nodes(
        ("FreqLoss_BandMerge", {"low": low, "high": low, "low_gain": 0.5, "high_gain": -2.0}),
        ("FreqLoss_BandMerge", {"low": low, "high": high, "low_gain": 1.0, "high_gain": 1.0}),
        ("FreqLoss_BandMerge", {"low": low, "high": latent(3, 4, 8, 9), "low_gain": 1.0, "high_gain": 1.0}),
    )
    torch.testing.assert_close(gained[0]["samples"], merge_bands(low["samples"], low["samples"], 0.5, -2.0))
    torch.testing.assert_close(broadcast[0]["samples"], low["samples"] + high["samples"])
    assert "noise_mask" in broadcast[0]
    assert refused == "ValueError: low has shape (3, 4, 8, 8) and high (3, 4, 8, 9): expected the same shape"


def test_the_operation_scales_bands_of_any_latent(nodes):
    inputs = {"low_gain": 0.5, "high_gain": 2.0, **BANDS}
    given = [each["samples"] for each in LATENTS.values()]
    for latents, (made,) in zip(
        given, nodes(*(("FreqLoss_BandOperation", inputs, latents) for latents in given)), strict=True
    ):
        assert torch.equal(made, scale_bands(latents, 0.5, 2.0, FreqLossConfig()))


def test_the_loss_is_that_of_training(nodes):
    """Against sd-scripts' scale of SD1.x, 0.18215, and FLUX' (z - 0.1159)·0.3611."""
    options = {"low_weight": 0.6, "high_weight": 0.1, "dist_match": 0.5}
    cases = {
        "SD1.x": (latent(3, 4, 16, 24), latent(3, 4, 16, 24), 0.18215),
        "FLUX": (latent(2, 16, 16, 8), latent(2, 16, 16, 8), 0.3611),
        "none (already scaled)": (latent(2, 4, 3, 8, 8), latent(2, 4, 3, 8, 8), 1.0),
    }
    for reduction in ("sum", "mean"):
        made = nodes(
            *(
                (
                    "FreqLoss_BandLoss",
                    {
                        "prediction": prediction,
                        "target": target,
                        "latent_format": name,
                        "reduction": reduction,
                        **options,
                        **BANDS,
                    },
                )
                for name, (prediction, target, _) in cases.items()
            )
        )
        for (prediction, target, scale), (low, high, total, error_map) in zip(cases.values(), made, strict=True):
            expected = frequency_matching_loss(
                prediction["samples"] * scale,
                target["samples"] * scale,
                prediction_type="sample",
                timesteps=None,
                config=FreqLossConfig(reduction=reduction, **options),
            )
            assert (low, high, total) == pytest.approx(
                [float(each) for each in (expected.low, expected.high, expected.total)], rel=1e-4
            )
            assert error_map.ndim == 4


def test_the_comparison_of_spectra_is_the_function(nodes):
    a, b = torch.rand(3, 40, 32, 3), torch.rand(2, 33, 65, 4)
    video = latent(1, 16, 4, 16, 16)
    pictures, latents = nodes(
        ("FreqLoss_SpectrumCompare", {"a": a, "b": b, **BANDS}),
        ("FreqLoss_SpectrumCompare", {"a": video, "b": video, **BANDS}),
    )
    expected = compare_spectra(a.movedim(-1, 1), b.movedim(-1, 1)[:, :3], FreqLossConfig())
    plot, table, distance = pictures
    assert plot.shape[-1] == 3
    assert table == expected.table()
    assert distance == pytest.approx(expected.distance)
    assert latents[2] == 0


def test_sheets_of_pictures_and_latents_of_every_kind(nodes):
    sources = [
        torch.rand(2, 33, 65, 3),
        torch.rand(1, 20, 20, 1),
        torch.rand(1, 20, 20, 4),
        torch.zeros(1, 16, 16, 3),
        *LATENTS.values(),
    ]
    rest = {"latent_format": "auto", "frame": 99, "panel_size": 64, **BANDS}
    made = nodes(*(("FreqLoss_BandPreview", {"source": source, **rest}) for source in sources))
    for source, (sheets,) in zip(sources, made, strict=True):
        count = len(source["samples"]) if isinstance(source, dict) else len(source)
        assert sheets.shape[0] == count
        assert sheets.shape[-1] == 3
        assert sheets.std() > 0.1


BAD = {
    "too many levels": (
        "FreqLoss_BandSplit",
        {"samples": latent(1, 4, 10, 64), **BANDS, "levels": 4},
        "ValueError: levels = 4: needs latents of at least 16 × 16, and these are 10 × 64 (pixels divided by the "
        "factor of the VAE, usually 8); set levels = 3",
    ),
    "sound": (
        "FreqLoss_BandSplit",
        {"samples": latent(1, 64, 100), **BANDS},
        "ValueError: samples has shape (1, 64, 100): expected 4 dimensions (B, C, H, W), or 5 (B, C, T, H, W)",
    ),
    "no tensor": (
        "FreqLoss_BandSplit",
        {"samples": {"samples": [1]}, **BANDS},
        "ValueError: samples holds list: expected a LATENT of pictures or video",
    ),
    "whole numbers": (
        "FreqLoss_BandSplit",
        {"samples": {"samples": torch.zeros(1, 4, 8, 8, dtype=torch.int64)}, **BANDS},
        "ValueError: samples has dtype torch.int64: expected a floating point tensor",
    ),
    "nothing": (
        "FreqLoss_BandPreview",
        {"source": torch.zeros(0, 8, 8, 3), "latent_format": "auto", "frame": 0, "panel_size": 64, **BANDS},
        "ValueError: source has shape (0, 8, 8, 3) and is empty: expected at least one picture",
    ),
    "a mask": (
        "FreqLoss_BandPreview",
        {"source": torch.zeros(1, 8, 8), "latent_format": "auto", "frame": 0, "panel_size": 64, **BANDS},
        "ValueError: source has shape (1, 8, 8): expected an IMAGE of shape (B, H, W, C)",
    ),
    "another format": (
        "FreqLoss_BandSplit",
        {"samples": latent(1, 4, 8, 8), **BANDS, "latent_format": "FLUX"},
        "ValueError: latent_format FLUX has 16 channels, and this latent has 4; choose SD1.x or SDXL",
    ),
    "unknown wavelet": (
        "FreqLoss_BandSplit",
        {"samples": latent(1, 4, 8, 8), **BANDS, "wavelet": "db99"},
        "ValueError: wavelet = 'db99': not a discrete wavelet of PyWavelets. Did you mean",
    ),
    "latents against pictures": (
        "FreqLoss_SpectrumCompare",
        {"a": torch.rand(1, 8, 8, 3), "b": latent(1, 4, 8, 8), **BANDS},
        "ValueError: a is of type IMAGE and b of type LATENT",
    ),
    "latents of two models": (
        "FreqLoss_SpectrumCompare",
        {"a": latent(1, 16, 8, 8), "b": latent(1, 4, 8, 8), **BANDS},
        "ValueError: A has 16 channels and B 4: expected the same number",
    ),
    "two batches": (
        "FreqLoss_BandLoss",
        {
            "prediction": latent(2, 4, 8, 8),
            "target": latent(3, 4, 8, 8),
            "low_weight": 0.7,
            "high_weight": 0.3,
            "dist_match": 0.003,
            "reduction": "sum",
            "latent_format": "SD1.x",
            **BANDS,
        },
        "ValueError: prediction has shape (2, 4, 8, 8) and target (3, 4, 8, 8): expected the same shape",
    ),
}


def test_bad_input_is_told_in_the_words_of_the_node(nodes):
    found = nodes(*((node, inputs) for node, inputs, _ in BAD.values()))
    for (name, (_, _, words)), said in zip(BAD.items(), found, strict=True):
        assert isinstance(said, str), name
        assert said.startswith(words), name
        assert "freq_loss_" not in said


def guided_lora(file, mean, clip="clip@1"):
    from freq_loss_plugin import guidance

    features = guidance.Features({}, clip, mean)
    save_file(sdxl_lora(), file, guidance.file_metadata(8.0, features))


def test_the_guidance_token_is_put_where_training_put_it(nodes):
    mean, embeds = torch.randn(768), torch.randn(3, 768)
    guided_lora(nodes.loras / "guided.safetensors", mean)
    save_file(sdxl_lora(), nodes.loras / "plain.safetensors")
    prompt = [[torch.randn(1, 77, 768), {"pooled_output": torch.ones(1)}], [torch.randn(2, 154, 768).half(), {}]]
    image = {"image_embeds": embeds}
    by_lora, by_image, half, nothing, both, unguided, wide = nodes(
        ("FreqLoss_GuidanceToken", {"conditioning": prompt, "lora_name": "guided.safetensors", "strength": 1.0}),
        ("FreqLoss_GuidanceToken", {"conditioning": prompt, "lora_name": "none", "strength": 1.0, "image": image}),
        ("FreqLoss_GuidanceToken", {"conditioning": prompt, "lora_name": "guided.safetensors", "strength": 0.5}),
        ("FreqLoss_GuidanceToken", {"conditioning": prompt, "lora_name": "none", "strength": 1.0}),
        (
            "FreqLoss_GuidanceToken",
            {"conditioning": prompt, "lora_name": "guided.safetensors", "strength": 1.0, "image": image},
        ),
        ("FreqLoss_GuidanceToken", {"conditioning": prompt, "lora_name": "plain.safetensors", "strength": 1.0}),
        (
            "FreqLoss_GuidanceToken",
            {"conditioning": [[torch.zeros(1, 77, 2048), {}]], "lora_name": "guided.safetensors", "strength": 1.0},
        ),
    )
    for (made,), features in ((by_lora, mean), (by_image, embeds.mean(dim=0))):
        for (states, rest), (before, kept) in zip(made, prompt, strict=True):
            assert torch.equal(states[:, :-1], before[:, :-1])
            torch.testing.assert_close(states[:, -1], features.to(before.dtype).expand(len(before), -1))
            assert rest.keys() == kept.keys()
    torch.testing.assert_close(half[0][0][0][:, -1], (prompt[0][0][:, -1] + mean) / 2)
    assert nothing.startswith("ValueError: there are no features: connect image")
    assert both.startswith("ValueError: both image and lora_name = guided.safetensors are given")
    assert unguided.startswith("LoraFileError: plain.safetensors carries no mean of its training pictures")
    assert wide.startswith("ValueError: the features are 768 wide, and this prompt's tokens 2048")


# -- the server: sampling with LoRAs ----------------------------------------------------------------------------------


def sampling(model, clip=None, *, steps=4, cfg=3.0, negative="", **more):
    """A prompt that samples the embedded model; node "latent" saves what comes out. ``more``: nodes by name."""
    clip = clip or ["checkpoint", 1]
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly-fp16.safetensors"),
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


def node(kind, **inputs):
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
        model=["checkpoint", 0],
        lora_name=name,
        strength_model=strength,
        strength_clip=strength_clip,
        **more,
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
    """Runs a prompt; the latents that it saved, and what its nodes showed."""

    def run(prompt):
        shown = comfyui_server.run(prompt)
        (entry,) = shown["saved"]["latents"]
        file = comfyui_server.folder / "output" / entry["subfolder"] / entry["filename"]
        return load_file(file)["latent_tensor"], shown

    return run


def test_the_loader_does_exactly_what_cores_loader_does(sample):
    bare, _ = sample(sampling(["checkpoint", 0]))
    for strength, clip in ((1.0, 1.0), (-0.5, 0.0)):
        expected, _ = sample(sampling(["lora", 0], ["lora", 1], lora=core(strength, clip)))
        ours = loader(strength, clip, clip=["checkpoint", 1])
        made, shown = sample(sampling(["lora", 0], ["lora", 1], lora=ours))
        assert torch.equal(made, expected)
        assert (made - bare).abs().max() > 0.05
        (text,) = shown["lora"]["text"]
        assert text.startswith("applied: 204 of 204 modules\nbase model: SD1.x")
        assert "frequency loss: dist_match 0.05, resolved_method wavelet" in text
        assert "WARNING" not in text


def test_the_loader_without_a_text_encoder(sample):
    expected, _ = sample(sampling(["lora", 0], lora=core(1.0, 0.0)))
    made, shown = sample(sampling(["lora", 0], lora=loader(1.0)))
    assert torch.equal(made, expected)
    assert shown["lora"]["text"][0].startswith(
        "applied: 192 of 192 modules; 12 of the text encoder are left out, there is no clip here\n"
    )


def test_a_gate_takes_the_low_band_from_one_strength_and_the_high_band_from_the_other(sample):
    """One Euler step from pure noise ends at the prediction itself, so that the bands can be compared."""
    by_strength = {
        strength: sample(sampling(["lora", 0], steps=1, lora=core(strength)))[0] for strength in (0.0, 1.0, -0.5)
    }
    for method in ("wavelet", "fft"):
        config = FreqLossConfig(method=method)
        for low, high in ((1.0, 0.0), (0.0, 1.0), (-0.5, 1.0)):
            made, shown = sample(sampling(["gate", 0], steps=1, gate=gate(low, high, method=method)))
            expected = split_bands(by_strength[low], config).low + split_bands(by_strength[high], config).high
            torch.testing.assert_close(made, expected, atol=2e-4, rtol=1e-3)
            assert "two model calls in each step from 0% to 100%" in shown["gate"]["text"][0]
            assert (made - by_strength[high]).abs().max() > 0.01


def other_kind(kind):
    """A LoRA of another kind for two layers of the embedded model, one of them a convolution."""

    def values(*shape):
        return torch.randn(shape, generator=generator) * 0.8

    generator = torch.Generator().manual_seed(9)
    linear = "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn1_to_out_0"
    conv = "lora_unet_up_blocks_3_resnets_2_conv2"
    if kind == "loha":
        made = {}
        for name, inputs in ((linear, 32), (conv, 32 * 9)):
            for part, shape in (("w1_a", (32, 2)), ("w1_b", (2, inputs)), ("w2_a", (32, 2)), ("w2_b", (2, inputs))):
                made[f"{name}.hada_{part}"] = values(*shape)
        return made
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


@pytest.mark.parametrize("kind", ["plain", "convolution", "tucker", "loha", "lokr", "difference"])
def test_gates_take_other_kinds_of_lora(comfyui_server, sample, kind):
    name = f"kind_{kind}.safetensors"
    save_file(other_kind(kind), comfyui_server.folder / "models" / "loras" / name)
    bare, _ = sample(sampling(["checkpoint", 0], steps=1))
    whole, _ = sample(sampling(["lora", 0], steps=1, lora=core(1.0, name=name)))
    gated = gate(1.0, 0.0)
    gated["inputs"]["lora_name"] = name
    made, _ = sample(sampling(["gate", 0], steps=1, gate=gated))
    expected = split_bands(whole, FreqLossConfig()).low + split_bands(bare, FreqLossConfig()).high
    assert (made - bare).abs().max() > 0.02
    torch.testing.assert_close(made, expected, atol=3e-4, rtol=1e-3)


def test_a_kind_that_is_no_addition_is_refused(comfyui_server):
    from server import PromptError

    save_file(other_kind("dora"), comfyui_server.folder / "models" / "loras" / "dora.safetensors")
    gated = gate(1.0, 0.0)
    gated["inputs"]["lora_name"] = "dora.safetensors"
    with pytest.raises(
        PromptError, match=r"dora\.safetensors cannot be gated: .*attn1\.to_out\.0 .*without DoRA\. Load it with"
    ):
        comfyui_server.run(sampling(["gate", 0], gate=gated))


def test_equal_strengths_are_cores_loader_with_one_call(sample):
    expected, _ = sample(sampling(["lora", 0], lora=core(0.8)))
    made, shown = sample(sampling(["gate", 0], gate=gate(0.8, 0.8)))
    assert torch.equal(made, expected)
    assert "equal strengths: applied as by the core loader" in shown["gate"]["text"][0]


def advanced(model, samples, first, last, *, begins):
    """Steps ``first`` to ``last`` of the four of `sampling`."""
    return node(
        "KSamplerAdvanced",
        model=model,
        add_noise="enable" if begins else "disable",
        noise_seed=5,
        steps=4,
        cfg=3.0,
        sampler_name="euler",
        scheduler="normal",
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=samples,
        start_at_step=first,
        end_at_step=last,
        return_with_leftover_noise="enable" if begins else "disable",
    )


def test_outside_its_range_the_model_runs_without_the_lora(sample):
    """The four steps are at timesteps 999, 666, 333 and 0; half of the sampling is the first two."""
    bare, _ = sample(sampling(["checkpoint", 0]))
    first = advanced(["lora", 0], ["empty", 0], 0, 2, begins=True)
    rest = advanced(["checkpoint", 0], ["first", 0], 2, 4, begins=False)
    expected, _ = sample({**sampling(["checkpoint", 0], lora=core(1.0), first=first), "sampler": rest})
    made, shown = sample(sampling(["gate", 0], gate=gate(1.0, 1.0, 0.0, 0.5)))
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    assert (made - bare).abs().max() > 0.05
    assert "one model call in each step from 0% to 50%" in shown["gate"]["text"][0]
    assert torch.equal(sample(sampling(["gate", 0], gate=gate(0.0, 0.0, 0.2, 0.5)))[0], bare)


def test_gates_follow_each_other_and_leave_no_trace(sample):
    bare, _ = sample(sampling(["checkpoint", 0]))
    chained = gate(0.0, 1.0, model=("first", 0))
    both, _ = sample(sampling(["second", 0], first=gate(1.0, 0.0), second=chained))
    again, _ = sample(sampling(["second", 0], first=gate(1.0, 0.0), second=chained, steps=4))
    assert torch.equal(both, again)
    assert (both - bare).abs().max() > 0.01
    # Other prompts in between, with the same loaded model, are not touched.
    after, _ = sample(sampling(["checkpoint", 0], negative=" "))
    sample(sampling(["gate", 0], gate=gate(1.0, 0.0)))
    assert torch.equal(sample(sampling(["checkpoint", 0], negative=" ", cfg=3.0))[0], after)


@pytest.mark.parametrize(("low", "high", "per_step"), [(1.0, 0.0, 2), (0.7, 0.7, 1), (1.0, 0.5, 2)])
def test_a_gate_has_one_more_model_call_per_step_and_none_where_strengths_are_equal(
    comfyui_server, sample, low, high, per_step
):
    log = comfyui_server.folder / "calls.txt"
    for steps in (3, 5):
        log.write_text("")
        counted = node("TinySD_CountCalls", model=["gate", 0], file=str(log), run=steps)
        sample(sampling(["counted", 0], steps=steps, gate=gate(low, high), counted=counted))
        assert len(log.read_text()) == steps * per_step


def test_the_operation_shapes_the_guidance_of_every_step(sample):
    """With one step, guidance g and gains (1, h): x = u + g·(low(c - u) + h·high(c - u))."""

    def made(cfg, **operation):
        if not operation:
            return sample(sampling(["checkpoint", 0], steps=1, cfg=cfg))[0]
        shaped = node("LatentApplyOperationCFG", model=["checkpoint", 0], operation=["operation", 0])
        operation = node("FreqLoss_BandOperation", **operation, **BANDS)
        return sample(sampling(["shaped", 0], steps=1, cfg=cfg, shaped=shaped, operation=operation))[0]

    conditional, guided = made(1.0), made(3.0)
    difference = (guided - conditional) / 2  # c - u
    unconditional = conditional - difference
    low, high = split_bands(difference, FreqLossConfig())
    expected = unconditional + 3 * (low + 2.5 * high)
    torch.testing.assert_close(made(3.0, low_gain=1.0, high_gain=2.5), expected, atol=3e-4, rtol=1e-3)


def test_the_range_must_not_be_empty(comfyui_server):
    from server import PromptError

    with pytest.raises(PromptError, match=r"start_percent = 0\.5 and end_percent = 0\.5: the LoRA would never act"):
        comfyui_server.run(sampling(["gate", 0], gate=gate(1.0, 0.0, 0.5, 0.5)))


def test_a_sheet_of_latents_decodes_them_where_there_is_a_vae(comfyui_server):
    """The panel of the original is the decoded latent; without a VAE it is made of its 16 × 16 colours."""
    import numpy as np
    from PIL import Image

    preview = {"source": ["sampler", 0], "latent_format": "auto", "frame": 0, "panel_size": 128, **BANDS}
    prompt = sampling(
        ["checkpoint", 0],
        decoded=node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        picture=node("PreviewImage", images=["decoded", 0]),
        with_vae=node("FreqLoss_BandPreview", vae=["checkpoint", 2], **preview),
        without=node("FreqLoss_BandPreview", **preview),
    )
    shown = comfyui_server.run(prompt)

    def pixels(name):
        with Image.open(comfyui_server.pictures(shown[name])[0]) as opened:
            return np.asarray(opened.convert("RGB"), dtype=float)

    picture, sheet, plain = (pixels(name) for name in ("picture", "with_vae", "without"))
    assert len(shown["with_vae"]["images"]) == len(shown["picture"]["images"]) == 2

    def nearest(whole):
        """How near the picture comes to any place of the sheet, as a mean difference of 0..255."""
        high, wide = whole.shape[0] - 128, whole.shape[1] - 128
        corners = ((y, x) for y in range(0, min(high, 60)) for x in range(0, min(wide, 90)))
        return min(abs(whole[y : y + 128, x : x + 128] - picture).mean() for y, x in corners)

    assert nearest(sheet) < 1
    assert nearest(plain) > 5


def test_a_guidance_token_reaches_the_sampler(comfyui_server, trained, sample):
    from freq_loss_plugin import guidance

    name = "guided.safetensors"
    features = guidance.Features({}, "clip@1", torch.randn(64, generator=torch.Generator().manual_seed(1)) * 3)
    metadata = guidance.file_metadata(8.0, features)
    save_file(load_file(trained.lora), comfyui_server.folder / "models" / "loras" / name, metadata)

    def made(strength):
        token = node("FreqLoss_GuidanceToken", conditioning=["words", 0], lora_name=name, strength=strength)
        words = node("CLIPTextEncode", clip=["checkpoint", 1], text="a red circle in the centre on white with checks")
        prompt = sampling(["lora", 0], lora=loader(name=name), words=words, token=token)
        prompt["sampler"]["inputs"]["positive"] = ["token", 0]
        return sample(prompt)

    expected, _ = sample(sampling(["lora", 0], lora=core(1.0, name=name)))
    assert torch.equal(made(0.0)[0], expected)
    guided, shown = made(1.0)
    assert (guided - expected).abs().max() > 0.05
    assert shown["token"]["text"] == ["mean of the training pictures by clip@1, 64 wide"]
    (text,) = shown["lora"]["text"]
    assert text.startswith("WARNING: trained with a guidance token: ")
    assert "put the node Guidance Token behind the positive prompt" in text
    assert "guidance token: yes, features by clip@1" in text


def test_long_work_can_be_cancelled(comfyui_server):
    import time

    from server import PromptError

    picture, many = node("LoadImage", image="example.png"), node("RepeatImageBatch", image=["picture", 0], amount=200)
    compared = node("FreqLoss_SpectrumCompare", a=["many", 0], b=["many", 0], **BANDS)
    prompt_id = comfyui_server.queue({"picture": picture, "many": many, "compared": compared})
    while not comfyui_server.get("/queue")["queue_running"]:
        time.sleep(0.05)
    time.sleep(2)
    comfyui_server.post("/interrupt", {})
    began = time.monotonic()
    with pytest.raises(PromptError, match="interrupted"):
        comfyui_server.wait(prompt_id)
    assert time.monotonic() - began < 20


# -- files that are no LoRA for this model -----------------------------------------------------------------------------


def sdxl_lora():
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    return {
        f"{name}.lora_down.weight": torch.randn(4, 640),
        f"{name}.lora_up.weight": torch.randn(640, 4),
        f"{name}.alpha": torch.tensor(4.0),
    }


def halves(trained_lora, keep):
    weights = load_file(trained_lora)
    return {key: value for number, (key, value) in enumerate(sorted(weights.items())) if number < keep or "te_" in key}


BAD_FILES = {
    "empty": (lambda _: b"", "is empty (0 bytes)"),
    "truncated_header": (lambda lora: lora.read_bytes()[:200], "is truncated: its header alone has"),
    "truncated_weights": (lambda lora: lora.read_bytes()[:-1000], "is damaged or incomplete"),
    "giant_header": (lambda _: struct.pack("<Q", 2**62) + b"{" + b" " * 100, "is no safetensors file"),
    "pickle": (lambda _: b"\x80\x02}q\x00.", "is a PyTorch pickle under another name"),
}
BAD_WEIGHTS = {
    "wrong_dtype": (lambda: {k: v.to(torch.int8) for k, v in sdxl_lora().items()}, "has dtype I8; expected floating"),
    "not_a_number": (
        lambda: {k: v * float("nan") for k, v in sdxl_lora().items()},
        "hold NaN or infinite values",
    ),
    "whole_model": (lambda: {"model.diffusion_model.out.2.weight": torch.zeros(4, 32, 3, 3)}, "holds no LoRA"),
    "sdxl": (
        sdxl_lora,
        "does not fit: none of its 1 modules has a place in this model (SD1.x). Likely reason: it was trained on SDXL, "
        "and this model is SD1.x",
    ),
    "unknown_names": (
        lambda: {"lora_unet_nothing_like_it.lora_down.weight": torch.zeros(4, 4)},
        "does not fit: none of its 1 modules has a place in this model (SD1.x). Likely reason: these layers are not",
    ),
}


@pytest.mark.parametrize("kind", [*BAD_FILES, *BAD_WEIGHTS])
def test_bad_files_get_a_clear_message_and_leave_the_server_alive(comfyui_server, trained, kind):
    from server import PromptError

    name = f"{kind}.safetensors"
    file = comfyui_server.folder / "models" / "loras" / name
    if kind in BAD_FILES:
        make, words = BAD_FILES[kind]
        file.write_bytes(make(trained.lora))
    else:
        make, words = BAD_WEIGHTS[kind]
        save_file(make(), file)
    for used in ({"lora": loader(name=name)}, {"lora": gate(1.0, 0.0) | {}}):
        if used["lora"]["class_type"] == "FreqLoss_LoraBandGate":
            used["lora"]["inputs"]["lora_name"] = name
        with pytest.raises(PromptError) as caught:
            comfyui_server.run(sampling(["lora", 0], **used))
        assert f"{name} {words}" in str(caught.value) or f"{name}: " in str(caught.value)
        assert words in str(caught.value)
    assert comfyui_server.get("/system_stats")["system"]["comfyui_version"]


def test_pickles_are_not_even_offered(comfyui_server):
    (comfyui_server.folder / "models" / "loras" / "old.pt").write_bytes(b"\x80\x02}q\x00.")
    for name in ("FreqLoss_LoraLoader", "FreqLoss_LoraBandGate"):
        info = comfyui_server.get(f"/object_info/{name}")[name]
        assert "old.pt" not in info["input"]["required"]["lora_name"][1]["options"]
        assert LORA in info["input"]["required"]["lora_name"][1]["options"]
    assert "old.pt" in comfyui_server.get("/object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0]


def test_a_lora_that_fits_in_part_is_applied_with_a_warning(comfyui_server, trained, sample):
    weights = load_file(trained.lora)
    known = dict(weights)
    for number, key in enumerate(sorted({each.split(".")[0] for each in weights if "unet" in each})[:3]):
        for ending in ("lora_down.weight", "lora_up.weight", "alpha"):
            known[f"lora_unet_elsewhere_{number}.{ending}"] = known.pop(f"{key}.{ending}")
    metadata = {"ss_base_model_version": "sdxl_base_v1-0", "ss_freq_loss_guidance_token": "8.0"}
    save_file(known, comfyui_server.folder / "models" / "loras" / "partly.safetensors", metadata)
    _, shown = sample(
        sampling(["lora", 0], ["lora", 1], lora=loader(name="partly.safetensors", clip=["checkpoint", 1]))
    )
    warnings = [line for line in shown["lora"]["text"][0].splitlines() if line.startswith("WARNING: ")]
    assert warnings[0] == "WARNING: trained on SDXL, and this model is SD1.x"
    assert warnings[1].startswith("WARNING: only 201 of 204 modules fit; likely reason: it was trained on SDXL")
    assert "elsewhere" in warnings[1]
    assert warnings[2].startswith("WARNING: trained with a guidance token")
    assert "only 201 of 204 modules fit" in comfyui_server.log.read_text()


def test_modules_of_another_size_are_left_out_by_both_nodes(comfyui_server, sample):
    lora, wrong = other_kind("plain"), "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    folder = comfyui_server.folder / "models" / "loras"
    save_file(lora, folder / "right.safetensors")
    lora |= {f"{wrong}.lora_up.weight": torch.randn(640, 4), f"{wrong}.lora_down.weight": torch.randn(4, 640)}
    save_file(lora, folder / "mixed.safetensors")
    bare, _ = sample(sampling(["checkpoint", 0], steps=1))
    whole, _ = sample(sampling(["lora", 0], steps=1, lora=core(1.0, name="right.safetensors")))
    loaded, shown = sample(sampling(["lora", 0], steps=1, lora=loader(1.0, name="mixed.safetensors")))
    assert torch.equal(loaded, whole)
    words = "WARNING: only 1 of 2 modules fit; likely reason: the layers have other sizes here"
    assert shown["lora"]["text"][0].startswith(words)
    gated = gate(1.0, 0.0)
    gated["inputs"]["lora_name"] = "mixed.safetensors"
    made, shown = sample(sampling(["gate", 0], steps=1, gate=gated))
    expected = split_bands(whole, FreqLossConfig()).low + split_bands(bare, FreqLossConfig()).high
    torch.testing.assert_close(made, expected, atol=3e-4, rtol=1e-3)
    assert shown["gate"]["text"][0].startswith(words)


def test_a_gate_tells_in_its_own_words_where_latents_are_too_small(comfyui_server):
    from server import PromptError

    with pytest.raises(
        PromptError, match=r"KSampler: levels = 5: needs latents of at least 32 × 32, and these are 16 × 16"
    ):
        comfyui_server.run(sampling(["gate", 0], gate=gate(1.0, 0.0, levels=5)))


def test_a_file_trained_again_under_its_name_is_read_again(comfyui_server, trained, sample):
    file = comfyui_server.folder / "models" / "loras" / "again.safetensors"
    weights = load_file(trained.lora)
    save_file(weights, file)
    prompt = sampling(["lora", 0], lora=loader(name="again.safetensors"))
    first, _ = sample(prompt)
    save_file({key: value * 0.5 for key, value in weights.items()}, file)
    prompt["saved"]["inputs"]["filename_prefix"] = "again"
    second, _ = sample(prompt)
    assert not torch.equal(first, second)


# -- example workflows -------------------------------------------------------------------------------------------------


def test_there_are_workflows_with_thumbnails():
    assert len(WORKFLOWS) >= 5
    for file in WORKFLOWS:
        assert file.with_suffix(".jpg").stat().st_size > 10_000
    used = {each["type"] for file in WORKFLOWS for each in json.loads(file.read_text())["nodes"]}
    assert used >= FROZEN.keys()


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_every_workflow_runs(comfyui_server, object_info, file):
    from PIL import Image
    from server import api_prompt

    prompt = api_prompt(json.loads(file.read_text()), comfyui_server.get("/object_info"))
    for each in prompt.values():
        # The embedded model draws pictures of 128 × 128; whoever has SD1.5 runs it at 512.
        if each["class_type"] == "EmptyLatentImage":
            each["inputs"].update(width=128, height=128)
    shown = comfyui_server.run(prompt)
    pictures = [file for outputs in shown.values() if "images" in outputs for file in comfyui_server.pictures(outputs)]
    assert pictures
    for picture in pictures:
        with Image.open(picture) as opened:
            darkest, brightest = opened.convert("L").getextrema()
        assert brightest - darkest > 30, picture
