"""The tensors that nodes return, called in a real ComfyUI without its server, and the errors for bad input."""

from __future__ import annotations

import comfyui_prompts
import pytest
import torch
from bad_images import enlarged, scene
from comfyui_prompts import BANDS, latent, sdxl_lora
from safetensors.torch import save_file

from freq_loss_plugin import BandSpec, LossSpec, frequency_matching_loss
from freq_loss_plugin.analysis.mixing import merge_bands, scale_bands
from freq_loss_plugin.analysis.spectra import compare_spectra
from freq_loss_plugin.guidance_token import features as guidance
from freq_loss_plugin.image_quality.measurement import measure_image
from freq_loss_plugin.image_quality.pixels import as_pixels
from freq_loss_plugin.image_quality.published import lookup

pytestmark = [pytest.mark.comfyui, pytest.mark.filterwarnings("default")]

nodes = comfyui_prompts.nodes


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
def test_split_and_merge_are_the_functions_and_keep_everything_else_in_the_latent(nodes, options):
    split = nodes(*(("FreqLoss_BandSplit", {"samples": given, **options}) for given in LATENTS.values()))
    merged = nodes(
        *(
            ("FreqLoss_BandMerge", {"low": low, "high": high, "low_gain": 1.0, "high_gain": 1.0})
            for low, high, _ in split
        )
    )
    bands = BandSpec(**options)
    for (name, given), (low, high, strip), (back,) in zip(LATENTS.items(), split, merged, strict=True):
        expected = bands.split(given["samples"])
        assert torch.equal(low["samples"], expected.low), name
        assert torch.equal(high["samples"], expected.high), name
        tolerance = {torch.float16: 4e-3, torch.bfloat16: 4e-2}.get(given["samples"].dtype, 1e-5)
        torch.testing.assert_close(back["samples"], given["samples"], atol=tolerance, rtol=0, msg=name)
        for output in (low, high, back):
            assert output.keys() == given.keys(), name
            for key in given.keys() - {"samples"}:
                assert output[key] is not None
                assert torch.equal(torch.as_tensor(output[key]), torch.as_tensor(given[key])), name
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
    latents = [latent["samples"] for latent in LATENTS.values()]
    outputs = nodes(*(("FreqLoss_BandOperation", inputs, samples) for samples in latents))
    for samples, (output,) in zip(latents, outputs, strict=True):
        assert torch.equal(output, scale_bands(samples, 0.5, 2.0, BandSpec()))


def test_the_operation_names_video_with_sound_inside_sampling(nodes):
    inputs = {"low_gain": 0.5, "high_gain": 2.0, **BANDS}
    (error,) = nodes(("FreqLoss_BandOperation", inputs, torch.zeros(1, 1, 3000)))
    assert error.startswith(
        "ValueError: the latent is video with audio (LTX-2, for instance), packed into a row of 3000"
    )


def test_the_loss_is_that_of_training(nodes):
    """Against sd-scripts' scale of SD1.x, 0.18215, and FLUX' (z - 0.1159)·0.3611."""
    options = {"low_weight": 0.6, "high_weight": 0.1, "dist_match": 0.5}
    cases = {
        "SD1.x": (latent(3, 4, 16, 24), latent(3, 4, 16, 24), 0.18215),
        "FLUX": (latent(2, 16, 16, 8), latent(2, 16, 16, 8), 0.3611),
        "none (already scaled)": (latent(2, 4, 3, 8, 8), latent(2, 4, 3, 8, 8), 1.0),
    }
    for reduction in ("sum", "mean"):
        outputs = nodes(
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
        for (prediction, target, scale), (low, high, total, error_map) in zip(cases.values(), outputs, strict=True):
            expected = frequency_matching_loss(
                prediction["samples"] * scale,
                target["samples"] * scale,
                prediction_type="sample",
                timesteps=None,
                config=LossSpec(reduction=reduction, **options),
            )
            assert (low, high, total) == pytest.approx(
                [float(value) for value in (expected.low, expected.high, expected.total)], rel=1e-4
            )
            assert error_map.ndim == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [3, 4])
def test_image_quality_is_the_function(nodes, dtype, channels):
    pixels = [as_pixels(image).movedim(0, -1) for image in (scene(1), enlarged(scene(2), 8))]
    batch = torch.cat([torch.stack(pixels), torch.rand(2, 128, 128, 1)], dim=-1)[..., :channels].to(dtype)
    ((report, resolution, spectra),) = nodes(("FreqLoss_ImageQuality", {"images": batch, "model": "flux1"}))
    expected = [measure_image(scene(1)), measure_image(enlarged(scene(2), 8))]
    lines = report.splitlines()
    assert lines[0] == "1: 128 × 128, full quality"
    restored, least = lookup("flux1", expected[1].defect)
    found = f"{expected[1].defect} ({expected[1].witness})"
    assert lines[1] == f"2: 128 × 128, {found}: {restored:.0%} restored, trains at t >= {least} (FLUX.1)"
    assert lines[2] == "1 of 2 of full quality"
    assert resolution == pytest.approx(expected[1].resolution, rel=0 if dtype == torch.float32 else 0.05)
    assert resolution == pytest.approx(1 / 8, rel=0.3)
    assert spectra.shape == (2, 440, 700, 3)
    assert not torch.equal(spectra[0], spectra[1])


def test_images_without_a_quality_are_named(nodes):
    found = nodes(
        ("FreqLoss_ImageQuality", {"images": torch.ones(1, 128, 128, 3), "model": "sdxl"}),
        ("FreqLoss_ImageQuality", {"images": torch.rand(1, 8, 200, 3), "model": "sdxl"}),
        ("FreqLoss_ImageQuality", {"images": torch.rand(1, 80, 80, 1), "model": "sdxl"}),
    )
    assert "one color: nothing to measure, taken as good" in found[0][0]
    assert "200×8 pixels are too few to measure, taken as good" in found[1][0]
    assert "too few edges to measure a blur, taken as good" in found[2][0]
    assert [one[0].splitlines()[-1] for one in found] == ["0 of 1 of full quality, 1 not known"] * 3
    assert [one[1] for one in found] == [1, 1, 1]


def test_the_comparison_of_spectra_is_the_function(nodes):
    a, b = torch.rand(3, 40, 32, 3), torch.rand(2, 33, 65, 4)
    video = latent(1, 16, 4, 16, 16)
    images, latents = nodes(
        ("FreqLoss_SpectrumCompare", {"a": a, "b": b, **BANDS}),
        ("FreqLoss_SpectrumCompare", {"a": video, "b": video, **BANDS}),
    )
    expected = compare_spectra(a.movedim(-1, 1), b.movedim(-1, 1)[:, :3], BandSpec())
    plot, table, distance = images
    assert plot.shape[-1] == 3
    assert table == expected.table()
    assert distance == pytest.approx(expected.distance)
    assert latents[2] == 0


def test_sheets_of_images_and_latents_of_every_kind(nodes):
    sources = [
        torch.rand(2, 33, 65, 3),
        torch.rand(1, 20, 20, 1),
        torch.rand(1, 20, 20, 4),
        torch.zeros(1, 16, 16, 3),
        *LATENTS.values(),
    ]
    rest = {"latent_format": "auto", "frame": 99, "panel_size": 64, **BANDS}
    outputs = nodes(*(("FreqLoss_BandPreview", {"source": source, **rest}) for source in sources))
    for source, (sheets,) in zip(sources, outputs, strict=True):
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
    "audio": (
        "FreqLoss_BandSplit",
        {"samples": latent(1, 64, 100), **BANDS},
        "ValueError: samples has shape (1, 64, 100): expected 4 dimensions (B, C, H, W), or 5 (B, C, T, H, W)",
    ),
    "no tensor": (
        "FreqLoss_BandSplit",
        {"samples": {"samples": [1]}, **BANDS},
        "ValueError: samples holds list: expected a LATENT of images or video",
    ),
    "whole numbers": (
        "FreqLoss_BandSplit",
        {"samples": {"samples": torch.zeros(1, 4, 8, 8, dtype=torch.int64)}, **BANDS},
        "ValueError: samples has dtype torch.int64: expected a floating point tensor",
    ),
    "nothing": (
        "FreqLoss_BandPreview",
        {"source": torch.zeros(0, 8, 8, 3), "latent_format": "auto", "frame": 0, "panel_size": 64, **BANDS},
        "ValueError: source has shape (0, 8, 8, 3) and is empty: expected at least one image",
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
    "no levels": (
        "FreqLoss_BandSplit",
        {"samples": latent(1, 4, 8, 8), **BANDS, "levels": 0},
        "ValueError: levels = 0: expected a whole number >= 1",
    ),
    "a cutoff beyond the highest frequency": (
        "FreqLoss_BandOperation",
        {"low_gain": 1.0, "high_gain": 2.0, **BANDS, "method": "fft", "cutoff": 0.6},
        "ValueError: cutoff = 0.6: expected a number above 0 and at most 0.5, the highest frequency of a latent",
    ),
    "a negative weight": (
        "FreqLoss_BandLoss",
        {
            "prediction": latent(2, 4, 8, 8),
            "target": latent(2, 4, 8, 8),
            "low_weight": -1.0,
            "high_weight": 0.3,
            "dist_match": 0.003,
            "reduction": "sum",
            "latent_format": "SD1.x",
            **BANDS,
        },
        "ValueError: low_weight = -1.0: expected a finite number >= 0",
    ),
    "latents against images": (
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


def test_errors_name_inputs_as_the_node_does(nodes):
    errors = nodes(*((node, inputs) for node, inputs, _ in BAD.values()))
    for (name, (_, _, expected)), error in zip(BAD.items(), errors, strict=True):
        assert isinstance(error, str), name
        assert error.startswith(expected), name
        assert "freq_loss_" not in error


def guided_lora(file, mean, clip="clip@1"):
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
    for (guided,), features in ((by_lora, mean), (by_image, embeds.mean(dim=0))):
        for (states, rest), (before, kept) in zip(guided, prompt, strict=True):
            assert torch.equal(states[:, :-1], before[:, :-1])
            torch.testing.assert_close(states[:, -1], features.to(before.dtype).expand(len(before), -1))
            assert rest.keys() == kept.keys()
    torch.testing.assert_close(half[0][0][0][:, -1], (prompt[0][0][:, -1] + mean) / 2)
    assert nothing.startswith("ValueError: there are no features: connect image")
    assert both.startswith("ValueError: both image and lora_name = guided.safetensors are given")
    assert unguided.startswith("LoraFileError: plain.safetensors has no mean of its training images")
    assert wide.startswith("ValueError: the features are 768 wide, and this prompt's tokens 2048")


def test_a_guidance_token_of_strength_0_is_off_and_one_that_is_not_finite_an_error(nodes):
    prompt = [[torch.randn(1, 77, 768), {}]]
    image = {"image_embeds": torch.full((1, 768), float("nan"))}
    (off,), broken = nodes(
        ("FreqLoss_GuidanceToken", {"conditioning": prompt, "lora_name": "no lora", "strength": 0.0}),
        ("FreqLoss_GuidanceToken", {"conditioning": prompt, "lora_name": "none", "strength": 1.0, "image": image}),
    )
    assert torch.equal(off[0][0], prompt[0][0])
    assert broken.startswith("ValueError: image holds NaN or infinite values")


def test_what_people_really_connect(nodes):
    """Each once looked at by hand: what can be measured is, and the rest says what it is."""
    images = {
        "with an alpha channel": torch.rand(1, 64, 64, 4),
        "gray": torch.rand(1, 64, 64, 1),
        "half": torch.rand(1, 64, 64, 3).half(),
        "beyond white": torch.rand(1, 64, 64, 3) * 4 - 2,
        "of one color": torch.zeros(1, 64, 64, 3),
        "not contiguous": torch.rand(1, 3, 64, 65).permute(0, 2, 3, 1),
    }
    preview = {"latent_format": "auto", "frame": 0, "panel_size": 128, **BANDS}
    for name, image in images.items():
        answers = nodes(
            ("FreqLoss_BandPreview", {"source": image, **preview}),
            ("FreqLoss_ImageQuality", {"images": image, "model": "sdxl"}),
            ("FreqLoss_SpectrumCompare", {"a": image, "b": torch.rand(3, 96, 128, 3), **BANDS}),
        )
        assert not any(isinstance(answer, str) for answer in answers), (name, answers)
        assert all(torch.isfinite(answer[0]).all() for answer in answers if torch.is_tensor(answer[0])), name
    mask, broken, broken_latent = nodes(
        ("FreqLoss_ImageQuality", {"images": torch.rand(1, 64, 64), "model": "sdxl"}),
        ("FreqLoss_ImageQuality", {"images": torch.full((1, 64, 64, 3), float("nan")), "model": "sdxl"}),
        (
            "FreqLoss_SpectrumCompare",
            {"a": latent(1, 4, 8, 8), "b": {"samples": torch.full((1, 4, 8, 8), float("inf"))}, **BANDS},
        ),
    )
    assert "a MASK becomes one with Convert Mask to Image" in mask
    assert broken.startswith("ValueError: images holds NaN or infinite values")
    assert broken_latent.startswith("ValueError: b holds NaN or infinite values")
