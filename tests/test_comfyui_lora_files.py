"""LoRA files in a real ComfyUI: loading, files that do not fit or are no LoRA, and files that change."""

from __future__ import annotations

import json
import struct

import comfyui_prompts
import pytest
import torch
from comfyui_prompts import LORA, core, gate, loader, node, other_kind, sampling, sdxl_lora
from safetensors.torch import load_file, save_file

from freq_loss_plugin import BandSpec
from freq_loss_plugin.guidance_token import features as guidance

pytestmark = [pytest.mark.comfyui, pytest.mark.filterwarnings("default")]

sample = comfyui_prompts.sample


def test_the_loader_does_exactly_what_cores_loader_does(sample):
    bare, _ = sample(sampling(["checkpoint", 0]))
    for strength, clip in ((1.0, 1.0), (-0.5, 0.0)):
        expected, _ = sample(sampling(["lora", 0], ["lora", 1], lora=core(strength, clip)))
        ours = loader(strength, clip, clip=["checkpoint", 1])
        made, shown = sample(sampling(["lora", 0], ["lora", 1], lora=ours))
        assert torch.equal(made, expected)
        assert (made - bare).abs().max() > 0.05
        (text,) = shown["lora"]["text"]
        applied = "204 of 204 modules"
        if clip == 0:
            applied = "192 of 192 modules; 12 of the text encoder are skipped, since strength_clip is 0"
        assert text.startswith(f"applied: {applied}\nbase model: SD1.x")
        assert "frequency loss: dist_match 0.05, resolved_method wavelet" in text
        assert "WARNING" not in text


def test_the_loader_without_a_text_encoder(sample):
    expected, _ = sample(sampling(["lora", 0], lora=core(1.0, 0.0)))
    made, shown = sample(sampling(["lora", 0], lora=loader(1.0)))
    assert torch.equal(made, expected)
    assert shown["lora"]["text"][0].startswith(
        "applied: 192 of 192 modules; 12 of the text encoder are skipped, since no clip is connected\n"
    )


def test_strengths_of_zero_switch_a_node_off_whatever_the_file(comfyui_server, trained, sample):
    bare, _ = sample(sampling(["checkpoint", 0]))
    loras = comfyui_server.folder / "models" / "loras"
    # In folders, and in no Latin script.
    name = "\u7d75\u67c4/\u30e2\u30c7\u30eb\u5225/\u30b9\u30bf\u30a4\u30eb \u2665.safetensors"
    (loras / name).parent.mkdir(parents=True, exist_ok=True)
    save_file(sdxl_lora(), loras / name)
    (loras / "half.safetensors").write_bytes(trained.lora.read_bytes()[:200])
    described = {
        name: "base model: SDXL",
        "half.safetensors": "half.safetensors is truncated",
        "nowhere.safetensors": "nowhere.safetensors is not in models/loras",
    }
    for file, words in described.items():
        # From another node, so that ComfyUI itself does not object to a file that is missing.
        given = {"name": node("TinySD_Name", name=file)}
        for off in ({"clip": ["checkpoint", 1]}, {"strength_clip": 1.0}):
            used = loader(0.0, **{"strength_clip": 0.0, **off}, name=["name", 0])
            made, shown = sample(sampling(["lora", 0], ["lora", 1] if "clip" in off else None, lora=used, **given))
            assert torch.equal(made, bare)
            assert shown["lora"]["text"][0].startswith(f"not applied: the strengths are 0\n{words}")
        for start, end in ((0.0, 1.0), (0.5, 0.5), (0.7, 0.2)):
            gated = gate(0.0, 0.0, start, end)
            gated["inputs"]["lora_name"] = ["name", 0]
            made, shown = sample(sampling(["lora", 0], lora=gated, **given))
            assert torch.equal(made, bare)
            assert shown["lora"]["text"] == ["not applied: the strengths are 0"]


def test_what_a_strength_of_0_switches_off_is_not_counted(comfyui_server, trained, sample):
    weights = load_file(trained.lora)
    loras = comfyui_server.folder / "models" / "loras"
    for part in ("unet", "te"):
        save_file({key: value for key, value in weights.items() if f"lora_{part}_" in key}, loras / f"{part}.sft")
    off = "of the diffusion model are skipped, since strength_model is 0"
    expected, _ = sample(sampling(["lora", 0], ["lora", 1], lora=core(0.0, 1.0)))
    made, shown = sample(sampling(["lora", 0], ["lora", 1], lora=loader(0.0, 1.0, clip=["checkpoint", 1])))
    assert torch.equal(made, expected)
    assert shown["lora"]["text"][0].startswith(f"applied: 12 of 12 modules; 192 {off}\n")
    bare, _ = sample(sampling(["checkpoint", 0]))
    for part, strengths, skipped in (
        ("unet", (0.0, 1.0), f"192 {off}"),
        ("te", (1.0, 0.0), "12 of the text encoder are skipped, since strength_clip is 0"),
    ):
        given = loader(*strengths, name=f"{part}.sft", clip=["checkpoint", 1])
        made, shown = sample(sampling(["lora", 0], ["lora", 1], lora=given))
        assert torch.equal(made, bare)
        assert shown["lora"]["text"][0].startswith(
            f"WARNING: no effect, since all of its modules are skipped\napplied: 0 of 0 modules; {skipped}\n"
        )


def test_a_lora_in_a_subfolder_with_a_name_in_any_script(comfyui_server, trained, sample):
    name = "\u7d75\u67c4/\uc2a4\ud0c0\uc77c \u00f1.safetensors"
    file = comfyui_server.folder / "models" / "loras" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(trained.lora.read_bytes())
    expected, _ = sample(sampling(["lora", 0], lora=loader(1.0)))
    made, shown = sample(sampling(["lora", 0], lora=loader(1.0, name=name)))
    assert torch.equal(made, expected)
    assert shown["lora"]["text"][0].startswith("applied: 192 of 192")


# -- files that are no LoRA for this model -----------------------------------------------------------------------------


BAD_FILES = {
    "empty": (lambda _: b"", "is empty (0 bytes)"),
    "truncated_header": (lambda lora: lora.read_bytes()[:200], "is truncated: its header alone has"),
    "truncated_weights": (lambda lora: lora.read_bytes()[:-1000], "is damaged or incomplete"),
    "giant_header": (lambda _: struct.pack("<Q", 2**62) + b"{" + b" " * 100, "is not a safetensors file"),
    "pickle": (lambda _: b"\x80\x02}q\x00.", "is a PyTorch pickle under another name"),
}
BAD_WEIGHTS = {
    "wrong_dtype": (lambda: {k: v.to(torch.int8) for k, v in sdxl_lora().items()}, "has dtype I8; expected floating"),
    "not_a_number": (
        lambda: {k: v * float("nan") for k, v in sdxl_lora().items()},
        "hold NaN or infinite values",
    ),
    "whole_model": (lambda: {"model.diffusion_model.out.2.weight": torch.zeros(4, 32, 3, 3)}, "contains no LoRA"),
    "sdxl": (
        sdxl_lora,
        "does not fit: none of its 1 modules matches a layer of this model (SD1.x). Likely reason: it was trained on "
        "SDXL, and this model is SD1.x",
    ),
    "unknown_names": (
        lambda: {"lora_unet_nothing_like_it.lora_down.weight": torch.zeros(4, 4)},
        "does not fit: none of its 1 modules matches a layer of this model (SD1.x). Likely reason: these layers are "
        "not part of this model",
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
    for number, key in enumerate(sorted({name.split(".")[0] for name in weights if "unet" in name})[:3]):
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


def test_a_lora_of_the_text_encoder_alone_needs_a_clip(comfyui_server, trained):
    from server import PromptError

    name = "te_alone.safetensors"
    weights = {key: value for key, value in load_file(trained.lora).items() if "lora_te_" in key}
    save_file(weights, comfyui_server.folder / "models" / "loras" / name)
    gated = gate(1.0, 0.0)
    gated["inputs"]["lora_name"] = name
    for used in (loader(1.0, name=name), gated):
        with pytest.raises(
            PromptError,
            match=f"{name} would have no effect: all of its 12 modules are of the text encoder, and no clip",
        ):
            comfyui_server.run(sampling(["lora", 0], lora=used))


def extra(kind, weights):
    """Tensors that ComfyUI leaves out, for a LoRA with these."""
    ups = [key for key in weights if key.startswith("lora_unet_") and key.endswith(".lora_up.weight")]
    modules = [key.removesuffix(".lora_up.weight") for key in ups[:3]]
    if "DoRA" in kind:
        ending = ".weight" if "newer" in kind else ""
        return {f"{name}.lora_magnitude_vector{ending}": torch.ones(8) for name in modules}
    if kind == "embeddings":
        return {f"bundle_emb.word.string_to_param.{key}": torch.ones(2, 768) for key in ("*", "clip_l")}
    if kind == "a scale":
        return {f"{modules[0]}.scalar": torch.ones(())}
    return {f"{modules[0]}.lora_A.bias": torch.ones(8), "something_else": torch.ones(1)}


UNUSED = {
    "PEFT's DoRA": "3 tensors of the file are not used, since ComfyUI does not know them: 3 lora_magnitude_vector",
    "PEFT's DoRA, as newer versions name it": "3 tensors of the file are not used, since ComfyUI does not know them: "
    "3 lora_magnitude_vector (DoRA in PEFT's format, so the effect is not the trained one)",
    "embeddings": "2 tensors of the file are not used, since ComfyUI does not know them: 2 bundle_emb (embeddings; to ",
    "a scale": "1 tensor of the file is not used, since ComfyUI does not know it: 1 scalar",
    "a bias": "2 tensors of the file are not used, since ComfyUI does not know them: 1 lora_A.bias; 1 something_else",
}


@pytest.mark.parametrize("kind", UNUSED)
def test_tensors_that_comfyui_leaves_out_are_counted_and_named(comfyui_server, trained, sample, kind):
    weights = load_file(trained.lora)
    more = extra(kind, weights)
    name = f"{kind.split()[-1]}.safetensors"
    save_file(weights | more, comfyui_server.folder / "models" / "loras" / name)
    expected, _ = sample(sampling(["lora", 0], ["lora", 1], steps=1, lora=core(1.0, 1.0, name=name)))
    for key in more:
        assert f"lora key not loaded: {key}\n" in comfyui_server.log.read_text()
    whole = loader(name=name, clip=["checkpoint", 1])
    made, shown = sample(sampling(["lora", 0], ["lora", 1], steps=1, lora=whole))
    assert torch.equal(made, expected)
    first, second = shown["lora"]["text"][0].splitlines()[:2]
    assert first.startswith(f"WARNING: {UNUSED[kind]}")
    assert second == "applied: 204 of 204 modules"
    gated = gate(1.0, 0.0)
    gated["inputs"]["lora_name"] = name
    _, shown = sample(sampling(["gate", 0], steps=1, gate=gated))
    assert shown["gate"]["text"][0].startswith(f"WARNING: {UNUSED[kind]}")


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
    expected = BandSpec().split(whole).low + BandSpec().split(bare).high
    torch.testing.assert_close(made, expected, atol=3e-4, rtol=1e-3)
    assert shown["gate"]["text"][0].startswith(words)


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


@pytest.mark.parametrize("kind", ["loader", "gate", "token"])
def test_a_name_from_another_node_runs_again_only_when_a_file_has_changed(comfyui_server, trained, kind):
    file = comfyui_server.folder / "models" / "loras" / f"linked_{kind}.safetensors"
    metadata = guidance.file_metadata(8.0, guidance.Features({}, "clip@1", torch.ones(64)))
    weights = load_file(trained.lora)
    save_file(weights, file, metadata)
    reads = {"loader": loader(), "gate": gate(1.0, 0.0)}.get(kind) or node(
        "FreqLoss_GuidanceToken", conditioning=["positive", 0], strength=1.0
    )
    reads["inputs"]["lora_name"] = ["name", 0]
    prompt = sampling(["reads" if kind != "token" else "checkpoint", 0], steps=1, reads=reads)
    prompt["name"] = node("TinySD_Name", name=file.name)
    if kind == "token":
        prompt["sampler"]["inputs"]["positive"] = ["reads", 0]

    def cached():
        prompt_id = comfyui_server.queue(prompt)
        comfyui_server.wait(prompt_id)
        messages = dict(comfyui_server.get(f"/history/{prompt_id}")[prompt_id]["status"]["messages"])
        return set(messages["execution_cached"]["nodes"])

    assert not {"reads", "sampler"} & cached()
    assert {"reads", "sampler"} <= cached()
    save_file({key: value * 0.5 for key, value in weights.items()}, file, metadata)
    assert not {"reads", "sampler"} & cached()
    assert "fingerprint" not in comfyui_server.log.read_text()


def test_metadata_goes_on_as_core_hands_it_on(comfyui_server):
    """ComfyUI 0.22 and newer keep it with the model and with the text encoder; older ones keep nothing."""

    def attached(lora, clip=False):
        prompt = {"checkpoint": sampling([])["checkpoint"], "lora": lora}
        prompt["shown"] = node("TinySD_Attachments", model=["lora", 0], **({"clip": ["lora", 1]} if clip else {}))
        return json.loads(comfyui_server.run(prompt)["shown"]["text"][0])

    for strength, clip in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        expected = attached(core(strength, clip), clip=True)
        assert attached(loader(strength, clip, clip=["checkpoint", 1]), clip=True) == expected
        if strength != 0:
            assert attached(loader(strength)) == attached(gate(1.0, 1.0)) == attached(gate(1.0, 0.0)) == expected[:1]
    whole = attached(core(1.0, 1.0), clip=True)
    assert whole[0] is None or whole[0]["ss_network_module"] == whole[1]["ss_network_module"] == "networks.lora"


def test_the_family_is_that_of_the_exact_class():
    """FLUX.2 is a subclass of FLUX.1, and Z-Image of Lumina 2."""
    families = comfyui_prompts.in_comfyui(
        """
        import comfy.supported_models as known
        fit = pack("lora_fit")

        def family(kind):
            model = types.SimpleNamespace(model=types.SimpleNamespace(model_config=object.__new__(kind)))
            return fit._model_family(model)

        answer = {kind.__name__: family(kind) for kind in known.models}
        answer["of a pack"] = family(type("Narrow", (known.SD15,), {}))
        """
    )
    expected = {"SD15": "SD1.x", "SDXL": "SDXL", "Flux": "FLUX.1", "FluxSchnell": "FLUX.1", "Lumina2": "Lumina 2"}
    assert {name: families[name] for name in expected} == expected
    assert families["of a pack"] == "SD1.x"
    assert families["HunyuanVideo"] is None
    assert families.get("Flux2", "FLUX.2") == "FLUX.2"
    assert families.get("ZImage", "Z-Image") == "Z-Image"
    assert families["ChromaRadiance"] is None
