"""Real runs of musubi-tuner's own scripts, with narrowed models: FLUX.2 on photos, Wan on clips."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import bad_images
import numpy as np
import oracle
import pytest
import torch
from balance_oracle import Expected
from safetensors.torch import load_file

pytestmark = [pytest.mark.musubi_tuner, pytest.mark.long, pytest.mark.filterwarnings("default")]

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=["flux_2", "wan"])
def musubi(request, tmp_path_factory):
    return made(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def flux_2(tmp_path_factory):
    return made("flux_2", tmp_path_factory)


_made = {}


def made(architecture, tmp_path_factory):
    """A checkout with models and caches, made once."""
    import hosts

    checkout = hosts.musubi_tuner()
    sys.path[:0] = [str(HERE / "sd_scripts_host"), str(HERE / "musubi_host")]
    from musubi_runs import MusubiTuner

    if architecture not in _made:
        _made[architecture] = MusubiTuner(checkout, architecture, tmp_path_factory.mktemp(architecture))
    return _made[architecture]


def passes_of(run, rank=0):
    return [event for event in run.events(rank) if event["kind"] == "pass"]


def sigma_of(event):
    """The noise levels that were really mixed, by least squares; shape (B,), float64."""
    direction = (event["noise"].double() - event["latents"].double()).flatten(1)
    moved = (event["noisy"].double() - event["latents"].double()).flatten(1)
    return (moved * direction).sum(1) / direction.square().sum(1)


def least_of(run):
    """The least timestep of the bad ones of six images, as the file says it."""
    summary = run.metadata["ss_freq_loss_image_quality_summary"]
    assert summary.startswith("6 images: 3 full quality; ")
    least = min(map(int, re.findall(r"train at t >= (\d+)", summary)))
    assert least > 20
    return least


def band_losses(event, counted=None):
    prediction, target = (event[name].double().numpy() for name in ("prediction", "target"))
    return oracle.loss(
        prediction,
        target,
        np.zeros(prediction.shape),
        prediction_type="flow",
        timesteps=(1000 * sigma_of(event)).clamp(max=999).tolist(),
        alphas_cumprod=np.ones(1000),
        weights=np.ones(len(prediction)) if counted is None else counted,
        bands=oracle.wavelet_bands,
    )


@pytest.mark.versions
def test_off_is_bit_identical_to_musubi_tuner_without_the_plug_in(musubi, tmp_path):
    plain = musubi.train(tmp_path / "plain")
    assert plain.returncode == 0, plain.output
    off = musubi.train(tmp_path / "off", freq_loss={"dist_match": 0})
    assert off.returncode == 0, off.output
    assert plain.lora.keys() == off.lora.keys()
    for name, tensor in plain.lora.items():
        assert torch.equal(tensor, off.lora[name]), name
    assert plain.scalars == off.scalars
    assert not [key for key in off.metadata if "freq" in key]
    assert off.metadata["ss_network_module"] == plain.metadata["ss_network_module"]


def test_unified_is_the_formula_and_leaves_the_trainers_random_numbers_alone(musubi, tmp_path):
    plain = musubi.train(tmp_path / "plain")
    run = musubi.train(tmp_path / "on", freq_loss={"dist_match": 0.05})
    assert run.returncode == 0, run.output
    extra, base = passes_of(run)[::2], passes_of(run)[1::2]
    for ours, theirs in zip(base, passes_of(plain), strict=True):
        for name in ("latents", "noise", "noisy", "timesteps"):
            assert torch.equal(ours[name], theirs[name]), name
    bands = [band_losses(event) for event in extra]
    for event in extra:
        assert sigma_of(event).std() < 1e-3
        assert 0.2 <= sigma_of(event)[0] < 0.6
    assert run.scalars["loss/freq_low"] == pytest.approx([low for low, _ in bands], rel=5e-3)
    assert run.scalars["loss/freq_high"] == pytest.approx([high for _, high in bands], rel=5e-3)
    losses = [event["loss"].item() for event in run.events() if event["kind"] == "base_loss"]
    totals = [base + total for base, total in zip(losses, run.scalars["loss/freq_total"], strict=True)]
    assert run.scalars["loss/current"] == pytest.approx(totals, rel=1e-5)
    assert run.metadata["ss_freq_loss_dist_match"] == "0.05"
    assert any(not torch.equal(tensor, plain.lora[name]) for name, tensor in run.lora.items())


def test_shared_with_a_ratio_has_no_extra_pass(musubi, tmp_path):
    options = {"dist_match": 1.0, "freq_loss_timesteps": "shared", "freq_loss_gradient_ratio": 0.1}
    run = musubi.train(tmp_path, freq_loss=options | {"freq_loss_grad_cosine": True}, max_train_steps=8)
    assert run.returncode == 0, run.output
    passes = passes_of(run)
    assert len(passes) == 8
    inside = [bool(((sigma_of(event) >= 0.2) & (sigma_of(event) < 0.6)).all()) for event in passes]
    assert 0 < sum(inside) < 8
    for event, is_inside in zip(passes, inside, strict=True):
        assert not is_inside or sigma_of(event).std() < 1e-3
    logged = run.scalars["loss/freq_low"]
    for event, is_inside, low in zip(passes, inside, logged, strict=True):
        assert low == pytest.approx(band_losses(event)[0] if is_inside else 0.0, rel=1e-2)


def test_balance_in_two_processes_with_accumulation_and_a_resumed_run(musubi, tmp_path):
    options = {"dist_match": 0, "freq_loss_balance": "band"}
    settings = {"gradient_accumulation_steps": 2, "save_every_n_steps": 2, "save_state": True}
    run = musubi.train(tmp_path / "first", freq_loss=options, processes=2, max_train_steps=2, **settings)
    assert run.returncode == 0, run.output
    state = tmp_path / "first" / "lora-step00000002-state"
    assert (state / "freq_loss_state.safetensors").is_file()
    expected = Expected("band")
    losses = []
    for events in zip(passes_of(run), passes_of(run, 1), strict=True):
        residuals = [(event["prediction"].double() - event["target"].double()).numpy() for event in events]
        at = [(1000 * sigma_of(event)).tolist() for event in events]
        expected.observe(np.concatenate(residuals), [*at[0], *at[1]])
        losses.append(expected.loss(residuals[0], at[0]))
    assert run.scalars["loss/current"] == pytest.approx(losses, rel=1e-3)
    resumed = musubi.train(tmp_path / "second", freq_loss=options, max_train_steps=1, resume=str(state))
    assert resumed.returncode == 0, resumed.output
    (event,) = passes_of(resumed)
    residual, at = (event["prediction"].double() - event["target"].double()).numpy(), (1000 * sigma_of(event)).tolist()
    expected.observe(residual, at)
    assert resumed.scalars["loss/current"] == pytest.approx([expected.loss(residual, at)], rel=1e-3)


def test_two_processes_form_one_batch(flux_2, tmp_path):
    run = flux_2.train(tmp_path, freq_loss={"dist_match": 0.05}, processes=2, max_train_steps=2)
    assert run.returncode == 0, run.output
    for step, events in enumerate(zip(passes_of(run)[::2], passes_of(run, 1)[::2], strict=True)):
        assert not torch.equal(events[0]["noise"], events[1]["noise"])
        names = ("prediction", "target", "latents", "noise", "noisy")
        together = {name: torch.cat([event[name] for event in events]) for name in names}
        assert sigma_of(together).std() < 1e-3
        assert run.scalars["loss/freq_low"][step] == pytest.approx(band_losses(together)[0], rel=5e-3)


def test_processes_at_images_of_different_sizes_wait_for_nobody(flux_2, tmp_path):
    """Without a seed, and with a distribution of timesteps that depends on the size: they disagree on the window."""
    images, cache = tmp_path / "images", tmp_path / "cache"
    images.mkdir()
    cache.mkdir()
    for number in range(6):
        scene = bad_images.scene(number)
        (scene.resize((512, 512)) if number % 2 else scene).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text("a scene")
        text = next((flux_2.folder / "cache").glob(f"{number}_*_te.safetensors"))
        (cache / text.name).write_bytes(text.read_bytes())
    sizes = {"resolution": [512, 512], "enable_bucket": True, "bucket_no_upscale": True, "batch_size": 1}
    flux_2.cache(images, cache, **sizes)
    config = flux_2.dataset(tmp_path / "dataset.toml", images, cache, **sizes)
    options = {"dist_match": 1.0, "freq_loss_timesteps": "shared", "freq_loss_gradient_ratio": 0.1}
    settings = {"dataset_config": str(config), "max_train_steps": 18, "seed": None}
    run = flux_2.train(tmp_path / "run", freq_loss=options, processes=2, **settings)
    assert run.returncode == 0, run.output
    differ = set()
    for first, second in zip(passes_of(run), passes_of(run, 1), strict=True):
        shapes = [event["latents"].shape for event in (first, second)]
        sigmas = [sigma_of(event) for event in (first, second)]
        inside = [bool(0.2 <= sigma[0] < 0.6) for sigma in sigmas]
        differ.add(shapes[0] != shapes[1])
        if shapes[0] == shapes[1]:
            assert inside[0] == inside[1]
            assert not inside[0] or abs(sigmas[0] - sigmas[1]) < 1e-3
    assert True in differ


def test_bad_images_train_where_they_tell_the_truth(flux_2, tmp_path):
    images, cache = tmp_path / "images", tmp_path / "cache"
    images.mkdir()
    cache.mkdir()
    for number in range(6):
        scene = bad_images.scene(number)
        (bad_images.enlarged(scene, 8) if number > 2 else scene).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text("a scene")
        text = next((flux_2.folder / "cache").glob(f"{number}_*_te.safetensors"))
        (cache / text.name).write_bytes(text.read_bytes())
    flux_2.cache(images, cache)
    config = flux_2.dataset(tmp_path / "dataset.toml", images, cache)
    settings = {"dataset_config": str(config), "max_train_steps": 9}
    options = {"dist_match": 0, "freq_loss_image_quality": "auto"}
    without = flux_2.train(tmp_path / "without", freq_loss=options, **settings)
    assert without.returncode != 0
    assert "needs the VAE to compare images" in without.output
    assert "Loading DiT" not in without.output
    vae = str(flux_2.folder / "vae.safetensors")
    run = flux_2.train(tmp_path / "run", freq_loss=options, vae=vae, **settings)
    assert run.returncode == 0, run.output
    plain = flux_2.train(tmp_path / "plain", **settings)
    least = least_of(run)
    seen = set()
    for event, before in zip(passes_of(run), passes_of(plain), strict=True):
        for place, name in enumerate(event["images"]):
            is_bad = int(Path(name).name.split("_")[0]) > 2
            seen.add(is_bad)
            if is_bad:
                assert 1000 * sigma_of(event)[place] > least - 1
            else:
                torch.testing.assert_close(event["noisy"][place], before["noisy"][place], rtol=1e-4, atol=1e-4)
    assert seen == {True, False}


def test_clips_train_by_the_quality_of_their_frames(tmp_path, tmp_path_factory):
    """Every second clip is of frames that were enlarged eightfold."""
    wan = made("wan", tmp_path_factory)
    options = {"dist_match": 0, "freq_loss_image_quality": "auto"}
    run = wan.train(tmp_path, freq_loss=options, vae=str(wan.folder / "vae.safetensors"), max_train_steps=6)
    assert run.returncode == 0, run.output
    least, drawn = least_of(run), []
    for event in passes_of(run):
        for place, name in enumerate(event["images"]):
            if int(Path(name).name.split("_")[0]) % 2:
                drawn.append(1000 * sigma_of(event)[place].item())
    assert len(drawn) == 6
    assert min(drawn) > least - 1


def test_clips_train_from_the_timestep_that_is_given_by_hand(tmp_path, tmp_path_factory):
    wan = made("wan", tmp_path_factory)
    rules = {"dist_match": 0, "image_quality": {"images": {"least_timestep": 700}}}
    run = wan.train(tmp_path, freq_loss=rules, max_train_steps=6)
    assert run.returncode == 0, run.output
    for event in passes_of(run):
        assert (sigma_of(event) > 0.699).all()


WRONG = {
    "misspelt": ({"freq_loss_metod": "fft"}, {}, "freq_loss_metod"),
    "no such option": ({"dist_match": "much"}, {}, "dist_match = 'much'"),
    "guidance token": ({"guidance_token": 8.0}, {}, "guidance_token = 8: replaces the last token of one CLIP"),
    "validation": ({"freq_loss_validation": True}, {}, "musubi-tuner has no validation"),
    "two weightings": ({"freq_loss_balance": "band"}, {"weighting_scheme": "cosmap"}, "both weigh the loss"),
    "timestep buckets": (
        {"freq_loss_timesteps": "shared"},
        {"num_timestep_buckets": 4},
        "freq_loss_timesteps = 'shared' with num_timestep_buckets = 4",
    ),
    "block swap": ({}, {"blocks_to_swap": 1}, "freq_loss_timesteps = 'unified' with blocks_to_swap = 1"),
    "no module": ({"freq_loss_network_module": "networks.lora_flux_3"}, {}, "no such Python module"),
}


@pytest.mark.parametrize(
    ("options", "settings", "words", "wrapper"),
    [
        *(pytest.param(*wrong, False, id=name) for name, wrong in WRONG.items()),
        pytest.param(*WRONG["misspelt"], True, id="misspelt, by the script in the root folder"),
    ],
)
def test_wrong_options_stop_before_a_model_is_loaded(flux_2, tmp_path, options, settings, words, wrapper):
    run = flux_2.train(tmp_path, freq_loss=options, wrapper=wrapper, **settings)
    assert run.returncode != 0
    assert words in run.output
    assert "\nfreq_loss: " in run.output
    assert "Traceback" not in run.output
    assert "Loading DiT" not in run.output


def test_comfyui_finds_every_module_of_the_lora(flux_2, tmp_path):
    import hosts

    comfyui = hosts.comfyui()
    run = flux_2.train(tmp_path, freq_loss={"dist_match": 0.05}, max_train_steps=1)
    assert len(run.lora) == 3 * 10
    command = [sys.executable, str(HERE / "comfyui_host" / "flux_2_modules.py"), str(comfyui)]
    done = subprocess.run([*command, str(tmp_path / "lora.safetensors")], capture_output=True, text=True)
    if "txt_ids_dims" in done.stderr:
        pytest.skip("this ComfyUI has no FLUX.2")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_latents_that_are_too_small_for_the_levels_stop_before_the_first_step(flux_2, tmp_path):
    run = flux_2.train(tmp_path, freq_loss={"freq_loss_levels": 4})
    assert run.returncode != 0
    assert "freq_loss_levels = 4" in run.output
    assert "epoch 1/" not in run.output


def test_weights_of_an_earlier_lora_can_be_gone_on_with(flux_2, tmp_path):
    first = flux_2.train(tmp_path / "first", freq_loss={"dist_match": 0.05}, max_train_steps=1)
    file = str(tmp_path / "first" / "lora.safetensors")
    run = flux_2.train(
        tmp_path / "second",
        freq_loss={"dist_match": 0.05, "freq_loss_timesteps": "own"},
        network_args=["rank_dropout=0.0", "conv_dimm=4"],
        network_weights=file,
        base_weights=[file],
        max_train_steps=1,
    )
    assert run.returncode == 0, run.output
    assert "does not know conv_dimm=4" in run.output.replace("\n", " ")
    assert "does not know rank_dropout" not in run.output
    assert first.lora.keys() == run.lora.keys() == load_file(file).keys()
