"""Latent formats in a real ComfyUI: which are offered, which is taken for a latent, and the colors it gives."""

from __future__ import annotations

import comfyui_prompts
import pytest
import torch
from comfyui_prompts import BANDS, in_comfyui, latent

pytestmark = [pytest.mark.comfyui, pytest.mark.filterwarnings("default")]

nodes = comfyui_prompts.nodes

# Saved in people's workflows: this list only grows.
FROZEN = """SD1.x, SDXL, FLUX, SD3, Wan 2.1 / Qwen-Image, HunyuanVideo, HunyuanImage 2.1, Wan 2.2, LTX-Video, Mochi,
Cosmos, Playground 2.5, Stable Cascade B, Stable Cascade C, pixel space""".replace("\n", " ").split(", ")
NEWER = {
    "FLUX.2": "Flux2",
    "HunyuanVideo 1.5": "HunyuanVideo15",
    "LTX-2": "LTXAV",
    "MiniMax H3": "MiniMaxH3Video",
    "Qwen-Image 2.1": "QwenImage21",
    "Ming-Image": "MingImage",
}


@pytest.fixture(scope="module")
def formats():
    """Label, class, channels and dimensions of every format offered; what auto takes; and core's classes."""
    return in_comfyui(
        """
        import comfy.latent_formats
        import numpy as np
        import torch

        formats = pack("formats")
        made = {label: getattr(comfy.latent_formats, name)() for label, name in formats.FORMATS.items()}
        offered = {
            label: [type(entry).__name__, entry.latent_channels, entry.latent_dimensions]
            for label, entry in made.items()
        }
        auto = {}
        for channels in (3, 4, 12, 16, 24, 32, 48, 64, 128, 7):
            for size in ((2, channels, 4, 6), (2, channels, 3, 4, 6)):
                selected = formats.select_format("auto", torch.zeros(size))
                auto[f"{channels} {len(size)}-D"] = formats.describe_colors("auto", selected)
        # The preview of every format, against core's own previewer.
        previews = {}
        import latent_preview
        for label, entry in made.items():
            if entry.latent_rgb_factors is None:
                continue
            latents = torch.randn(1, entry.latent_channels, 4, 6, generator=torch.Generator().manual_seed(0))
            ours = formats.latent_to_rgb(latents, entry)
            more = [entry.latent_rgb_factors_reshape] if hasattr(entry, "latent_rgb_factors_reshape") else []
            theirs = latent_preview.Latent2RGBPreviewer(entry.latent_rgb_factors, entry.latent_rgb_factors_bias, *more)
            scaled = formats.to_model_scale(latents, entry)
            image = np.asarray(theirs.decode_latent_to_preview(scaled))
            previews[label] = [float(abs(ours[0].permute(1, 2, 0).numpy() * 255 - image).max()), *ours.shape[-2:]]
        core = [name for name in dir(comfy.latent_formats) if isinstance(getattr(comfy.latent_formats, name), type)]
        answer = {"offered": offered, "auto": auto, "previews": previews, "core": core}
        """
    )


def test_the_labels_of_workflows_stay_and_newer_formats_follow(formats):
    labels = list(formats["offered"])
    assert labels[: len(FROZEN)] == FROZEN
    for label, name in NEWER.items():
        assert (label in labels) == (name in formats["core"])
    assert len({name for name, *_ in formats["offered"].values()}) == len(labels)
    offered = [name for name, *_ in formats["offered"].values()]
    assert not [name for name in offered if "Audio" in name or "Music" in name or "3D" in name or "Trellis" in name]
    assert "HunyuanImage21Refiner" not in offered
    assert not {"LatentFormat", "ZImagePixelSpace", "MiniMaxH3AV"} & set(offered)


def test_auto_takes_images_for_images_and_video_for_video(formats):
    auto, core = formats["auto"], formats["core"]

    def guessed(label, channels):
        alike = sum(number == channels for _, number, _ in formats["offered"].values())
        assert alike > 1
        return f"colors: {label} (guessed: {alike} formats have {channels} channels; choose one in latent_format)"

    assert auto["4 4-D"] == guessed("SD1.x", 4)
    assert auto["16 4-D"] == auto["16 5-D"] == guessed("FLUX", 16)
    if "QwenImage21" not in core:
        assert auto["64 4-D"] == "colors: HunyuanImage 2.1"
    assert auto["48 5-D"] == "colors: Wan 2.2"
    assert auto["7 4-D"] == "colors: mean of the channels"
    if "Flux2" in core:
        assert auto["128 4-D"] == guessed("FLUX.2", 128)
        assert auto["128 5-D"] == guessed("LTX-Video", 128)
        assert auto["32 5-D"] == "colors: HunyuanVideo 1.5"


def test_the_colors_are_those_of_cores_own_previews(formats):
    for label, (difference, height, width) in formats["previews"].items():
        assert difference <= 1, label
        assert (height, width) == ((8, 12) if label == "FLUX.2" else (4, 6))


def test_previews_of_images_and_video_by_every_format(nodes, formats):
    calls = []
    for label, (_, channels, dimensions) in formats["offered"].items():
        for given in (latent(2, channels, 8, 16), latent(2, channels, 3, 8, 16)):
            if dimensions == 2 and given["samples"].ndim == 5:
                continue
            calls.append(("FreqLoss_BandSplit", {"samples": given, **BANDS, "latent_format": label}))
    for (_, inputs), (low, high, strips) in zip(calls, nodes(*calls), strict=True):
        label = inputs["latent_format"]
        assert strips.shape == ((2, 16, 96, 3) if label == "FLUX.2" else (2, 8, 48, 3)), label
        torch.testing.assert_close(low["samples"] + high["samples"], inputs["samples"]["samples"], atol=1e-5, rtol=0)


def test_the_loss_scales_images_by_video_formats(nodes):
    """An image of Wan 2.1 or Qwen-Image gives the same loss as a video of one frame."""
    options = {"low_weight": 0.7, "high_weight": 0.3, "dist_match": 1.0, "reduction": "sum", **BANDS}
    prediction, target = latent(1, 16, 8, 8), latent(1, 16, 8, 8)
    video = [{"samples": latent["samples"].unsqueeze(2)} for latent in (prediction, target)]
    calls = [
        ("FreqLoss_BandLoss", {"prediction": a, "target": b, "latent_format": "Wan 2.1 / Qwen-Image", **options})
        for a, b in ((prediction, target), video)
    ]
    image, frame = nodes(*calls)
    assert image[:3] == pytest.approx(frame[:3], rel=1e-5)


NEWER_FORMATS = """
import comfy.latent_formats as known
import torch

class QwenImage21(known.LatentFormat):
    latent_channels = 64

    def __init__(self):
        self.latent_rgb_factors = [[0.01, 0.0, -0.01]] * 64
        self.mean = torch.arange(64.0).view(1, 64, 1, 1)

    def process_in(self, latent):
        return (latent - self.mean) / 4

class MingImage(known.LatentFormat):
    latent_channels, scale_factor = 16, 8.0

answer = {}
for made in (QwenImage21, MingImage):
    if not hasattr(known, made.__name__):
        setattr(known, made.__name__, made)
        answer[made.__name__] = "made up"
formats = pack("formats")
answer["labels"] = list(formats.FORMATS)
latents = torch.randn(2, 64, 3, 4, 6)
answer["auto"] = formats.describe_colors("auto", formats.select_format("auto", latents[:, :, 0]))
qwen = formats.select_format("Qwen-Image 2.1", latents)
whole = formats.to_model_scale(latents, qwen)
frames = [qwen.process_in(latents[:, :, frame]) for frame in range(3)]
answer["frames"] = torch.equal(whole, torch.stack(frames, dim=2))
answer["chosen"] = formats.describe_colors("Qwen-Image 2.1", qwen)
ming = formats.select_format("Ming-Image", torch.zeros(1, 16, 4, 4))
answer["ming"] = formats.to_model_scale(torch.ones(1, 16, 4, 4), ming).unique().tolist()
"""


def test_formats_of_newer_versions_are_offered_by_name_and_scaled_by_their_own_class():
    """ComfyUI 0.37 and newer: 64 channels with a mean and a standard deviation each, and 16 with one factor.

    The classes here have made-up values; what is tested is that the installed class is found and asked.
    """
    answer = in_comfyui(NEWER_FORMATS)
    assert {"Qwen-Image 2.1", "Ming-Image"} < set(answer["labels"])
    assert answer["auto"] == (
        "colors: HunyuanImage 2.1 (guessed: 2 formats have 64 channels; choose one in latent_format)"
    )
    assert answer["frames"]
    assert answer["chosen"] == "colors: Qwen-Image 2.1"
    if "MingImage" in answer:
        assert answer["ming"] == [8.0]
