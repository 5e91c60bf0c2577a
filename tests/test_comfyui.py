"""The nodes in a real ComfyUI: their schemas, sampling with them, and the example workflows."""

from __future__ import annotations

import json

import comfyui_prompts
import pytest
import torch
from comfyui_prompts import BAND_INPUTS, BANDS, ROOT, core, in_comfyui, loader, node, sampling
from safetensors.torch import load_file, save_file

from freq_loss_plugin import BandSpec, FreqLossConfig

pytestmark = [pytest.mark.comfyui, pytest.mark.filterwarnings("default")]

sample = comfyui_prompts.sample
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))

# Ids and inputs are saved in everyone's workflows: this table only grows, and by optional inputs only.
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
    "FreqLoss_ImageQuality": (["images", "model"], [], ["STRING", "FLOAT", "IMAGE"]),
}


@pytest.fixture(scope="module")
def object_info(comfyui_server):
    return comfyui_server.get("/object_info")


# -- schemas --------------------------------------------------------------------------------------------------------


def test_every_node_has_the_inputs_and_outputs_that_workflows_rely_on(object_info):
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
    from freq_loss_plugin.loss.wavelet_library import discrete_wavelets

    _, options = object_info["FreqLoss_BandSplit"]["input"]["required"]["wavelet"]
    assert tuple(options["options"]) == discrete_wavelets()


def test_a_comfyui_that_lacks_something_is_named_with_its_version():
    version, of_one_node, of_all = in_comfyui(
        """
        import comfy.patcher_extension
        import comfy.utils
        import comfyui_version

        answer = [comfyui_version.__version__]
        core = pack("core")
        del comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, comfy.utils.ProgressBar
        for arguments in ((core.GATE, "LoraBandGate"), (core.ALL_NODES,)):
            try:
                core.require(*arguments)
            except ImportError as error:
                answer.append(str(error))
        """
    )
    assert of_one_node.startswith(
        f"LoraBandGate does not work with this ComfyUI ({version}), which lacks "
        "comfy.patcher_extension:WrappersMP.CALC_COND_BATCH; expected 0.3.64 or newer"
    )
    assert of_all.startswith(f"freq_loss_plugin does not work with this ComfyUI ({version}), which lacks comfy.utils:P")


# -- the server: sampling ----------------------------------------------------------------------------------------------


def test_the_operation_is_frequency_decoupled_guidance(sample):
    """One step ends at u + w_low·low(c - u) + w_high·high(c - u), with w = cfg·gain, as the help page says."""

    def sampled(cfg, *gains):
        if not gains:
            return sample(sampling(["checkpoint", 0], steps=1, cfg=cfg))[0]
        shaped = node("LatentApplyOperationCFG", model=["checkpoint", 0], operation=["operation", 0])
        operation = node("FreqLoss_BandOperation", low_gain=gains[0], high_gain=gains[1], **BANDS)
        return sample(sampling(["shaped", 0], steps=1, cfg=cfg, shaped=shaped, operation=operation))[0]

    conditional, guided = sampled(1.0), sampled(3.0)
    difference = (guided - conditional) / 2  # c - u
    unconditional = conditional - difference
    low, high = BandSpec().split(difference)
    for cfg, low_gain, high_gain in ((3.0, 1.0, 2.5), (5.0, 1.0, 2.0), (10.0, 0.5, 1.0)):
        expected = unconditional + cfg * low_gain * low + cfg * high_gain * high
        torch.testing.assert_close(sampled(cfg, low_gain, high_gain), expected, atol=2e-3, rtol=1e-3)
    # The same weights by other gains; and with cfg = 1, ComfyUI leaves out u.
    torch.testing.assert_close(sampled(5.0, 1.0, 2.0), sampled(10.0, 0.5, 1.0), atol=1e-3, rtol=1e-3)
    low, high = BandSpec().split(conditional)
    torch.testing.assert_close(sampled(1.0, 1.0, 2.0), low + 2 * high, atol=1e-3, rtol=1e-3)


def test_the_workflow_with_the_operation_says_which_weights_its_values_mean():
    workflow = json.loads(next(file for file in WORKFLOWS if file.stem.startswith("6_")).read_text())
    values = {entry["type"]: entry["widgets_values"] for entry in workflow["nodes"] if "widgets_values" in entry}
    low_gain, high_gain = values["FreqLoss_BandOperation"][:2]
    cfgs = {entry["widgets_values"][3] for entry in workflow["nodes"] if entry["type"] == "KSampler"}
    (cfg,) = cfgs
    assert cfg > 1
    (note,) = values["MarkdownNote"]
    for band, gain in (("low", low_gain), ("high", high_gain)):
        assert f"- {band} band: cfg × {band}_gain = {cfg:g} × {gain:g} = {cfg * gain:g}\n" in note
    assert cfg * low_gain < cfg * high_gain


def test_a_sheet_of_latents_decodes_them_where_there_is_a_vae(comfyui_server):
    """The panel of the original is the decoded latent; without a VAE it consists of 16 × 16 colors."""
    import numpy as np
    from PIL import Image

    preview = {"source": ["sampler", 0], "latent_format": "auto", "frame": 0, "panel_size": 128, **BANDS}
    prompt = sampling(
        ["checkpoint", 0],
        decoded=node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        image=node("PreviewImage", images=["decoded", 0]),
        with_vae=node("FreqLoss_BandPreview", vae=["checkpoint", 2], **preview),
        without=node("FreqLoss_BandPreview", **preview),
    )
    shown = comfyui_server.run(prompt)

    def pixels(name):
        with Image.open(comfyui_server.images(shown[name])[0]) as opened:
            return np.asarray(opened.convert("RGB"), dtype=float)

    image, sheet, plain = (pixels(name) for name in ("image", "with_vae", "without"))
    assert len(shown["with_vae"]["images"]) == len(shown["image"]["images"]) == 2

    def smallest_difference(sheet):
        """The mean difference, 0..255, of the image and the most similar region of the sheet."""
        height, width = sheet.shape[0] - 128, sheet.shape[1] - 128
        corners = ((y, x) for y in range(min(height, 60)) for x in range(min(width, 90)))
        return min(abs(sheet[y : y + 128, x : x + 128] - image).mean() for y, x in corners)

    assert smallest_difference(sheet) < 1
    assert smallest_difference(plain) > 5


def test_a_guidance_token_reaches_the_sampler(comfyui_server, trained, sample):
    from freq_loss_plugin.guidance_token import features as guidance

    name = "guided.safetensors"
    features = guidance.Features({}, "clip@1", torch.randn(64, generator=torch.Generator().manual_seed(1)) * 3)
    metadata = guidance.file_metadata(8.0, features)
    save_file(load_file(trained.lora), comfyui_server.folder / "models" / "loras" / name, metadata)

    def sampled(strength):
        token = node("FreqLoss_GuidanceToken", conditioning=["words", 0], lora_name=name, strength=strength)
        words = node("CLIPTextEncode", clip=["checkpoint", 1], text="a red circle in the centre on white with checks")
        prompt = sampling(["lora", 0], lora=loader(name=name), words=words, token=token)
        prompt["sampler"]["inputs"]["positive"] = ["token", 0]
        return sample(prompt)

    expected, _ = sample(sampling(["lora", 0], lora=core(1.0, name=name)))
    unguided, shown = sampled(0.0)
    assert torch.equal(unguided, expected)
    (text,) = shown["lora"]["text"]  # the next run has it from the cache, and newer versions then show nothing
    guided, shown = sampled(1.0)
    assert (guided - expected).abs().max() > 0.05
    assert shown["token"]["text"] == ["mean of the training images by clip@1, 64 wide"]
    assert text.startswith("WARNING: trained with a guidance token: ")
    assert "put the node Guidance Token after the positive prompt" in text
    assert "guidance token: yes, features by clip@1" in text


def test_a_running_node_can_be_canceled(comfyui_server):
    import time

    from server import PromptError

    image, many = node("LoadImage", image="example.png"), node("RepeatImageBatch", image=["image", 0], amount=200)
    compared = node("FreqLoss_SpectrumCompare", a=["many", 0], b=["many", 0], **BANDS)
    prompt_id = comfyui_server.queue({"image": image, "many": many, "compared": compared})
    while not comfyui_server.get("/queue")["queue_running"]:
        time.sleep(0.05)
    time.sleep(2)
    comfyui_server.post("/interrupt", {})
    began = time.monotonic()
    with pytest.raises(PromptError, match="interrupted"):
        comfyui_server.wait(prompt_id)
    assert time.monotonic() - began < 20


# -- example workflows -------------------------------------------------------------------------------------------------


def test_there_are_workflows_with_thumbnails():
    assert len(WORKFLOWS) >= 5
    for file in WORKFLOWS:
        assert file.with_suffix(".jpg").stat().st_size > 10_000
    used = {entry["type"] for file in WORKFLOWS for entry in json.loads(file.read_text())["nodes"]}
    assert used >= FROZEN.keys()


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_every_workflow_runs(comfyui_server, object_info, file):
    from PIL import Image
    from server import api_prompt

    prompt = api_prompt(json.loads(file.read_text()), comfyui_server.get("/object_info"))
    for entry in prompt.values():
        # The toy model generates 128 × 128 pixels; the workflows are for SD1.5 at 512.
        if entry["class_type"] == "EmptyLatentImage":
            entry["inputs"].update(width=128, height=128)
    shown = comfyui_server.run(prompt)
    images = [file for outputs in shown.values() if "images" in outputs for file in comfyui_server.images(outputs)]
    assert images
    for image in images:
        with Image.open(image) as opened:
            darkest, brightest = opened.convert("L").getextrema()
        assert brightest - darkest > 30, image
