"""A LoRA on one band: the node Gate LoRA by Frequency Band in a real ComfyUI."""

from __future__ import annotations

import comfyui_prompts
import hosts
import pytest
import torch
from comfyui_prompts import BANDS, core, gate, node, other_kind, sampling
from safetensors.torch import save_file

from freq_loss_plugin import BandSpec

pytestmark = [pytest.mark.comfyui, pytest.mark.filterwarnings("default")]

sample = comfyui_prompts.sample


def test_a_gate_takes_the_low_band_from_one_strength_and_the_high_band_from_the_other(sample):
    """One Euler step from pure noise ends at the prediction itself, so that the bands can be compared."""
    by_strength = {
        strength: sample(sampling(["lora", 0], steps=1, lora=core(strength)))[0] for strength in (0.0, 1.0, -0.5)
    }
    for method in ("wavelet", "fft"):
        bands = BandSpec(method)
        for low, high in ((1.0, 0.0), (0.0, 1.0), (-0.5, 1.0)):
            made, shown = sample(sampling(["gate", 0], steps=1, gate=gate(low, high, method=method)))
            expected = bands.split(by_strength[low]).low + bands.split(by_strength[high]).high
            torch.testing.assert_close(made, expected, atol=2e-4, rtol=1e-3)
            assert "two model calls in each step from 0% to 100%" in shown["gate"]["text"][0]
            assert (made - by_strength[high]).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["plain", "convolution", "tucker", "loha", "lokr", "difference"])
def test_gates_take_other_kinds_of_lora(comfyui_server, sample, kind):
    name = f"kind_{kind}.safetensors"
    save_file(other_kind(kind), comfyui_server.folder / "models" / "loras" / name)
    bare, _ = sample(sampling(["checkpoint", 0], steps=1))
    whole, _ = sample(sampling(["lora", 0], steps=1, lora=core(1.0, name=name)))
    gated = gate(1.0, 0.0)
    gated["inputs"]["lora_name"] = name
    made, _ = sample(sampling(["gate", 0], steps=1, gate=gated))
    expected = BandSpec().split(whole).low + BandSpec().split(bare).high
    assert (made - bare).abs().max() > 0.02
    torch.testing.assert_close(made, expected, atol=3e-4, rtol=1e-3)


def test_a_kind_that_is_not_an_addition_is_refused(comfyui_server):
    from server import PromptError

    save_file(other_kind("dora"), comfyui_server.folder / "models" / "loras" / "dora.safetensors")
    gated = gate(1.0, 0.0)
    gated["inputs"]["lora_name"] = "dora.safetensors"
    with pytest.raises(
        PromptError, match=r"dora\.safetensors cannot be gated: .*attn1\.to_out\.0 .*without DoRA\. Use a LoRA loader"
    ):
        comfyui_server.run(sampling(["gate", 0], gate=gated))


def test_a_lora_for_rows_of_a_fused_layer_is_cores():
    """Names of diffusers, and ``linear1_qkv``, mean rows of FLUX.1's joint projections."""
    answer = comfyui_prompts.in_comfyui("import fused_layers\nanswer = fused_layers.compare(pack)")
    refused = answer.pop("dora")
    assert refused.startswith("fused cannot be gated: it adapts diffusion_model.double_blocks.0.img_attn.qkv by")
    matched, wrong_size, kept = answer.pop("wrong size")
    assert [name.rpartition(".")[2] for name in (*matched, *wrong_size)] == ["to_q", "to_k"]
    assert {key.split(".")[4] for key in kept} == {"to_q"}
    assert len(answer) == 4
    for kind, found in answer.items():
        assert [path.rpartition(".")[2] for path in found["layers"]] == ["qkv", "linear1"]
        assert found["error"] < 1e-4 < 1 < found["change"], kind
        assert found["matched"] == 3
        # Core would look for the bias under a name that no model has.
        assert len(found["unused"]) == (3 if kind == "no bias of a part" else 0)


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


def test_the_range_must_not_be_empty(comfyui_server):
    from server import PromptError

    with pytest.raises(PromptError, match=r"start_percent = 0\.5 and end_percent = 0\.5: the LoRA would never act"):
        comfyui_server.run(sampling(["gate", 0], gate=gate(1.0, 0.0, 0.5, 0.5)))


def test_a_gate_refuses_latents_that_are_too_small(comfyui_server):
    from server import PromptError

    with pytest.raises(
        PromptError, match=r"KSampler: levels = 5: needs latents of at least 32 × 32, and these are 16 × 16"
    ):
        comfyui_server.run(sampling(["gate", 0], gate=gate(1.0, 0.0, levels=5)))


# -- models that torch.compile has compiled ----------------------------------------------------------------------------


def compiled(model):
    # The other backend, inductor, takes a minute to compile the toy model.
    return node("TorchCompileModel", model=model, backend="cudagraphs")


COMPILED = {
    "compiled before": {
        "compiled": compiled(["checkpoint", 0]),
        "model": ["gate", 0],
        "below the gate": ("compiled", 0),
    },
    "compiled behind": {
        "compiled": compiled(["gate", 0]),
        "model": ["compiled", 0],
        "below the gate": ("checkpoint", 0),
    },
}


@pytest.mark.long
@pytest.mark.parametrize("order", COMPILED)
@pytest.mark.parametrize(
    ("low", "high", "end"), [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 0.5, 1.0), (1.0, 1.0, 0.5), (1.0, -0.5, 0.5)]
)
def test_a_compiled_model_makes_the_same_image(sample, order, low, high, end):
    bare, _ = sample(sampling(["checkpoint", 0]))
    expected, _ = sample(sampling(["gate", 0], gate=gate(low, high, 0.0, end)))
    chain = COMPILED[order]
    gated = gate(low, high, 0.0, end, model=chain["below the gate"])
    made, _ = sample(sampling(chain["model"], gate=gated, compiled=chain["compiled"]))
    assert (expected - bare).abs().max() > 0.05
    torch.testing.assert_close(made, expected, atol=1e-3, rtol=1e-3)
    # The gate leaves nothing behind.
    after, _ = sample(sampling(["compiled", 0], compiled=compiled(["checkpoint", 0])))
    torch.testing.assert_close(after, bare, atol=1e-3, rtol=1e-3)


@pytest.mark.long
def test_gates_behind_each_other_on_a_compiled_model(sample):
    first, second = gate(1.0, 0.0), gate(0.0, 1.0, model=("first", 0))
    expected, _ = sample(sampling(["second", 0], first=first, second=second))
    second = gate(0.0, 1.0, model=("compiled", 0))
    made, _ = sample(sampling(["second", 0], first=first, second=second, compiled=compiled(["first", 0])))
    torch.testing.assert_close(made, expected, atol=1e-3, rtol=1e-3)


def test_a_gate_acts_on_every_copy_of_the_model(sample):
    if not (hosts.comfyui() / "comfy" / "multigpu.py").is_file():
        pytest.skip("this ComfyUI has no copies of a model")
    expected, _ = sample(sampling(["gate", 0], gate=gate(1.0, -0.5)))
    spread = node("TinySD_Copy", model=["gate", 0])
    made, _ = sample(sampling(["spread", 0], gate=gate(1.0, -0.5), spread=spread))
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


def test_a_cache_inside_a_step_is_refused_and_one_around_steps_is_not(comfyui_server, sample):
    from server import PromptError

    options = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}

    def cached(kind, low, high):
        cache = node(kind, model=["gate", 0], **options)
        prompt = sampling(["cache", 0], steps=8, gate=gate(low, high, 0.0, 0.9), cache=cache)
        prompt["empty"]["inputs"]["batch_size"] = 1  # EasyCache of 0.3.64 fails with more
        return prompt

    with pytest.raises(PromptError, match="EasyCache would reuse the prediction with the LoRA at low_strength"):
        comfyui_server.run(cached("EasyCache", 1.0, 0.0))
    for prompt in (cached("EasyCache", 1.0, 1.0), cached("LazyCache", 1.0, 0.0)):
        assert sample(prompt)[0].isfinite().all()


# -- latents without height and width ----------------------------------------------------------------------------------


def test_video_with_audio_is_refused_by_name(comfyui_server):
    from server import PromptError

    if not (hosts.comfyui() / "comfy" / "nested_tensor.py").is_file():
        pytest.skip("this ComfyUI has no latents of video with audio")
    both = {"both": node("TinySD_AddAudio", samples=["empty", 0])}
    gated = {**sampling(["gate", 0], gate=gate(1.0, 0.0)), **both}
    gated["sampler"]["inputs"]["latent_image"] = ["both", 0]
    with pytest.raises(PromptError, match=r"KSampler: the latent is video with audio \(LTX-2, for instance\), packed"):
        comfyui_server.run(gated)
    operation = node("FreqLoss_BandOperation", low_gain=1.0, high_gain=2.0, **BANDS)
    for name, of_one in {
        "samples": {"asked": node("FreqLoss_BandSplit", samples=["both", 0], **BANDS)},
        "source": {
            "asked": node(
                "FreqLoss_BandPreview", source=["both", 0], latent_format="auto", frame=0, panel_size=64, **BANDS
            )
        },
        "the latent": {
            "operation": operation,
            "applied": node("LatentApplyOperation", samples=["both", 0], operation=["operation", 0]),
            "asked": node("SaveLatent", samples=["applied", 0], filename_prefix="audio"),
        },
    }.items():
        with pytest.raises(PromptError, match=rf"{name} holds several latents in one .* separate them with"):
            comfyui_server.run({"empty": gated["empty"], **both, **of_one})
