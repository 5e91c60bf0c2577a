"""Real trainings: an unmodified sd-scripts, run by its own script on an SD1.5-shaped model and real photos."""

from __future__ import annotations

import subprocess

import hosts
import numpy as np
import oracle
import pytest
import torch

pytestmark = [pytest.mark.sd_scripts, pytest.mark.long]

# How far into the line sd-scripts' log reaches before it folds.
LOADS_THE_MODEL = "load Diffusers pretrained"

ALPHAS = oracle.stable_diffusion_alphas_cumprod()


@pytest.fixture(scope="session")
def plain(sd_scripts, tmp_path_factory):
    """sd-scripts without the plug-in."""
    run = sd_scripts.train(tmp_path_factory.mktemp("plain"))
    assert run.returncode == 0, run.output
    return run


@pytest.fixture(scope="session")
def unified(sd_scripts, tmp_path_factory):
    """The two lines of the README: nothing but the network module and dist_match."""
    run = sd_scripts.train(tmp_path_factory.mktemp("unified"), freq_loss={"dist_match": 0.003})
    assert run.returncode == 0, run.output
    return run


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_scalars_are_the_formula(
    run, *, dist_match, bands=oracle.wavelet_bands, prediction_type="epsilon", alphas=ALPHAS, weigh=None, processes=1
):
    """Every ``loss/freq_*`` of the run, recomputed in float64 from the predictions and targets of all processes."""
    batches = run.batches()
    of_all = list(zip(*(run.batches(rank) for rank in range(processes)), strict=True))
    assert len(batches) == len(run.scalars["loss/freq_low"]) > 0
    for index, batch in enumerate(batches):
        passes = [each.get("extra", each["base"]) for each in of_all[index]]
        used = {key: torch.cat([each[key] for each in passes]) for key in ("prediction", "target", "timesteps")}
        prediction, target = (used[key].double().numpy() for key in ("prediction", "target"))
        timesteps = used["timesteps"].tolist()
        weights = torch.cat([each["loss_weights"] for each in of_all[index]]).double().numpy()
        if weigh is not None:
            weights = weights * [weigh(t) for t in timesteps]
        mask = None
        if "alpha_masks" in batch:
            size = prediction.shape[-2:]
            mask = torch.nn.functional.interpolate(batch["alpha_masks"].double()[:, None], size, mode="area").numpy()
        low, high = oracle.loss(
            prediction,
            target,
            np.zeros_like(prediction),
            prediction_type=prediction_type,
            timesteps=timesteps,
            alphas_cumprod=alphas,
            weights=weights,
            bands=bands,
            mask=mask,
        )
        total = dist_match * (0.7 * low + 0.3 * high)
        base = batch["loss"].item()
        expected = {"freq_low": low, "freq_high": high, "freq_total": total, "freq_share": total / (base + total)}
        for name, value in expected.items():
            assert run.scalars[f"loss/{name}"][index] == pytest.approx(value, rel=2e-5), (index, name)
        assert run.scalars["loss/current"][index] == pytest.approx(base + total, rel=1e-6)


def test_off_is_bit_identical_to_sd_scripts_without_the_plugin(sd_scripts, plain, tmp_path):
    off = sd_scripts.train(tmp_path, freq_loss={"dist_match": 0})
    assert off.returncode == 0, off.output
    assert_same_weights(off.lora, plain.lora)
    assert off.scalars == plain.scalars
    assert off.metadata["ss_network_module"] == "networks.lora"
    assert not [key for key in off.metadata if key.startswith("ss_freq_loss")]
    assert "dist_match = 0" in off.output


def test_on_adds_the_formula_and_leaves_the_base_pass_alone(plain, unified):
    assert_scalars_are_the_formula(unified, dist_match=0.003)
    drawn = []
    for batch, untouched in zip(unified.batches(), plain.batches(), strict=True):
        # The target is the noise: the base pass sees the same noise and timesteps as without the plug-in.
        assert torch.equal(batch["base"]["target"], untouched["base"]["target"])
        assert torch.equal(batch["base"]["timesteps"], untouched["base"]["timesteps"])
        assert not torch.equal(batch["extra"]["target"], batch["base"]["target"])
        (timestep,) = set(batch["extra"]["timesteps"].tolist())
        drawn.append(timestep)
    assert all(200 <= timestep < 600 for timestep in drawn)
    assert len(set(drawn)) > 1
    assert any(not torch.equal(unified.lora[name], plain.lora[name]) for name in plain.lora)


def test_the_file_is_an_ordinary_lora_that_says_how_it_was_trained(plain, unified):
    assert unified.lora.keys() == plain.lora.keys()
    assert unified.metadata["ss_network_module"] == "networks.lora"
    assert unified.metadata["ss_freq_loss_dist_match"] == "0.003"
    assert unified.metadata["ss_freq_loss_resolved_method"] == "wavelet"
    from freq_loss_plugin import FreqLossConfig, __version__

    assert unified.metadata["ss_freq_loss_version"] == __version__
    assert FreqLossConfig().metadata().keys() <= unified.metadata.keys()


def test_says_at_the_start_what_it_does_and_later_how_much(unified):
    output = " ".join(unified.output.split())
    assert output.count("on for SD1.x / SD2.x (prediction type epsilon)") == 1
    assert "freq_loss_method = wavelet freq_loss_wavelet = db3 freq_loss_levels = 2" in output
    assert "cost: one extra forward and backward pass per batch" in output
    # After the last step here, because the run is shorter than 50.
    assert "up to step 4 the frequency" in output
    assert "too little to act; multiply" in output.replace("dist_match by", "dist_match by")


def test_own_timesteps_with_everything_that_meets_the_hook(sd_scripts, material, tmp_path):
    """v-prediction, zero terminal SNR, min-SNR, FFT, regularisation images, alpha masks and accumulation at once."""
    import material as make

    make.make_photos(tmp_path / "masked", 64, alpha=True)
    run = sd_scripts.train(
        tmp_path / "run",
        freq_loss={
            "dist_match": 0.05,
            "freq_loss_timesteps": "own",
            "freq_loss_method": "fft",
            "freq_loss_min_timestep": 100,
            "freq_loss_max_timestep": 950,
            "freq_loss_sample_weights": "min_snr",
        },
        train_data_dir=str(tmp_path / "masked"),
        reg_data_dir=str(material / "photos"),
        prior_loss_weight=0.5,
        alpha_mask=True,
        gradient_accumulation_steps=2,
        max_train_steps=3,
        v_parameterization=True,
        zero_terminal_snr=True,
        min_snr_gamma=5.0,
    )
    assert run.returncode == 0, run.output
    alphas = ALPHAS**0.5
    alphas = ((alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])) ** 2

    def weigh(timestep):
        snr = alphas[timestep] / (1 - alphas[timestep])
        return float(100 <= timestep < 950) * min(snr, 5.0) / (snr + 1)

    batches = run.batches()
    assert len(batches) == 6
    assert all("extra" not in batch for batch in batches)
    assert any((batch["loss_weights"] == 0.5).any() for batch in batches)
    assert all("alpha_masks" in batch for batch in batches)
    assert_scalars_are_the_formula(
        run, dist_match=0.05, bands=oracle.fft_bands, prediction_type="v_prediction", alphas=alphas, weigh=weigh
    )


def test_bf16_with_gradient_checkpointing_and_text_encoder(sd_scripts, tmp_path):
    run = sd_scripts.train(
        tmp_path,
        freq_loss={"dist_match": 0.01},
        mixed_precision="bf16",
        gradient_checkpointing=True,
        text_encoder_lr=[1e-3],
        max_train_steps=3,
    )
    assert run.returncode == 0, run.output
    prediction = run.batches()[0]["extra"]["prediction"]
    assert torch.equal(prediction, prediction.bfloat16().to(prediction.dtype))
    assert_scalars_are_the_formula(run, dist_match=0.01)
    text_encoder = [tensor for name, tensor in run.lora.items() if name.startswith("lora_te") and "lora_up" in name]
    assert any(tensor.abs().sum() > 0 for tensor in text_encoder)


def test_two_processes_match_one_batch_at_the_same_timestep_with_noise_of_their_own(sd_scripts, tmp_path):
    run = sd_scripts.train(tmp_path, freq_loss={"dist_match": 0.01}, processes=2, max_train_steps=2)
    assert run.returncode == 0, run.output
    assert_scalars_are_the_formula(run, dist_match=0.01, processes=2)
    assert run.output.count("on for SD1.x / SD2.x") == 1
    for first, second in zip(run.batches(0), run.batches(1), strict=True):
        assert torch.equal(first["extra"]["timesteps"], second["extra"]["timesteps"])
        assert not torch.equal(first["extra"]["target"], second["extra"]["target"])


def test_shared_timesteps_need_no_extra_pass_and_processes_agree(sd_scripts, tmp_path):
    options = {"dist_match": 0.01, "freq_loss_timesteps": "shared"}
    run = sd_scripts.train(tmp_path, freq_loss=options, processes=2, max_train_steps=6, train_text_encoder=False)
    assert run.returncode == 0, run.output
    assert run.metadata["ss_freq_loss_timesteps"] == "shared"
    shared = []
    for first, second in zip(run.batches(0), run.batches(1), strict=True):
        assert "extra" not in first
        drawn = torch.cat([first["base"]["timesteps"], second["base"]["timesteps"]])
        inside = (drawn >= 200) & (drawn < 600)
        shared.append(bool(inside.all()))
        assert len(set(drawn.tolist())) == 1 if shared[-1] else not inside.any()
    assert set(shared) == {True, False}
    assert [value > 0 for value in run.scalars["loss/freq_total"]] == shared


def test_continues_from_weights(sd_scripts, plain, tmp_path):
    settings = {"network_weights": str(plain.folder / "lora.safetensors"), "dim_from_weights": True}
    continued = sd_scripts.train(tmp_path / "plain", max_train_steps=2, **settings)
    off = sd_scripts.train(tmp_path / "off", freq_loss={"dist_match": 0}, max_train_steps=2, **settings)
    on = sd_scripts.train(tmp_path / "on", freq_loss={"dist_match": 0.01}, max_train_steps=2, **settings)
    for run in (continued, off, on):
        assert run.returncode == 0, run.output
    assert_same_weights(off.lora, continued.lora)
    assert_scalars_are_the_formula(on, dist_match=0.01)


def test_base_weights_are_merged_without_a_hook(sd_scripts, plain, tmp_path):
    settings = {"base_weights": [str(plain.folder / "lora.safetensors")], "max_train_steps": 2}
    merged = sd_scripts.train(tmp_path / "plain", **settings)
    off = sd_scripts.train(tmp_path / "off", freq_loss={"dist_match": 0}, **settings)
    assert off.returncode == merged.returncode == 0, off.output
    assert off.output.count("off (dist_match = 0)") == 1
    assert_same_weights(off.lora, merged.lora)


def test_validation_is_that_of_sd_scripts(sd_scripts, tmp_path):
    """At a learning rate of nearly 0 the predictions stay, so the validation losses must agree to the last bit."""
    settings = {"learning_rate": 1e-30, "validation_split": 0.34, "validate_every_n_steps": 1, "max_train_steps": 2}
    settings["gradient_checkpointing"] = True  # of the kind that forbids autograd.grad further back than a loss
    without = sd_scripts.train(tmp_path / "plain", **settings)
    options = {"freq_loss_validation": True, "freq_loss_share": 0.1, "freq_loss_grad_cosine": True}
    on = sd_scripts.train(tmp_path / "on", freq_loss={"dist_match": 0.5, **options}, **settings)
    for run in (without, on):
        assert run.returncode == 0, run.output
    names = [name for name in without.scalars if "validation" in name and "average" in name]
    assert names
    for name in names:
        assert on.scalars[name] == without.scalars[name]
    assert on.scalars["loss/current"] != without.scalars["loss/current"]
    # The same passes in bands, as often as sd-scripts validates.
    assert on.scalars.keys() - without.scalars.keys() == {
        *(f"loss/freq_{name}" for name in ("low", "high", "total", "share", "weight", "grad_cosine")),
        *(f"loss/validation/freq_{name}" for name in ("low", "high", "spectrum_low", "spectrum_high")),
    }
    validated = [event for event in on.events() if event["kind"] == "pass" and not event["is_train"]]
    inside = [event for event in validated if 200 <= event["timesteps"][0] < 600]
    times = len(on.scalars["loss/validation/freq_low"])
    assert 0 < len(inside) < len(validated)
    assert times == len(without.scalars["loss/validation/step_average"]) + len(
        without.scalars.get("loss/validation/epoch_average", [])
    )
    low = [(oracle.wavelet_bands(residual_sum({"extra": event})[None])[0] ** 2).mean() for event in inside]
    each = np.mean(np.reshape(low, (times, -1)), axis=1)
    assert on.scalars["loss/validation/freq_low"] == pytest.approx(list(each), rel=1e-4)
    assert all(-1 <= cosine <= 1 for cosine in on.scalars["loss/freq_grad_cosine"])


def test_resuming_continues_the_sequence_of_timesteps_and_noise(sd_scripts, tmp_path):
    settings = {"save_every_n_steps": 2, "save_state": True, "max_train_steps": 4}
    options = {"dist_match": 0.01, "freq_loss_memory": 2, "freq_loss_memory_decay": 0.5, "freq_loss_share": 0.05}
    whole = sd_scripts.train(tmp_path / "whole", freq_loss=options, **settings)
    state = tmp_path / "whole" / "lora-step00000002-state"
    assert state.is_dir(), whole.output
    resumed = sd_scripts.train(tmp_path / "resumed", freq_loss=options, resume=str(state), **settings)
    assert resumed.returncode == 0, resumed.output
    for late, first in zip(whole.batches()[2:], resumed.batches(), strict=False):
        assert torch.equal(late["extra"]["timesteps"], first["extra"]["timesteps"])
        assert torch.equal(late["extra"]["target"], first["extra"]["target"])
    # The memory goes on as well: the first step after the pause joins the two before it.
    joined = [residual_sum(batch) for batch in (*whole.batches()[:2], resumed.batches()[0])]
    low, high = oracle.wavelet_bands((joined[2] + 0.5 * joined[1] + 0.25 * joined[0])[None])
    assert resumed.scalars["loss/freq_low"][0] == pytest.approx((low**2).mean(), rel=1e-4)
    assert resumed.scalars["loss/freq_high"][0] == pytest.approx((high**2).mean(), rel=1e-4)
    # So do the averages behind the share; from nothing, the weight would begin at dist_match.
    assert whole.scalars["loss/freq_weight"][0] == pytest.approx(0.01)
    # (Two earlier batches of three are the same; the third holds other pictures.)
    assert resumed.scalars["loss/freq_weight"][0] == pytest.approx(whole.scalars["loss/freq_weight"][2], rel=0.1)
    assert resumed.scalars["loss/freq_weight"][0] > 0.011
    # sd-scripts without the plug-in takes such a state, too.
    plain = sd_scripts.train(tmp_path / "plain", resume=str(state), **settings)
    assert plain.returncode == 0, plain.output


def residual_sum(batch):
    """D of a recorded batch at one timestep, epsilon prediction."""
    used = batch["extra"]
    alpha_bar = ALPHAS[used["timesteps"][0]]
    difference = (used["prediction"].double() - used["target"].double()).sum(dim=0).numpy()
    return -((1 - alpha_bar) ** 0.5) / alpha_bar**0.5 * difference


def test_a_diverging_training_stops_and_the_last_file_stays_whole(sd_scripts, tmp_path):
    run = sd_scripts.train(
        tmp_path, freq_loss={"dist_match": 0.003}, learning_rate=1e30, save_every_n_steps=1, max_train_steps=5
    )
    assert run.returncode != 0
    message = run.output[run.output.index("NonFiniteLossError") :]
    for words in ("is not finite in step 2", "timesteps =", "of 512 not finite", "lower the learning rate", "intact"):
        assert words in message
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["lora-step00000001.safetensors"]
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "lora-step00000001.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.parametrize(
    ("freq_loss", "arguments", "words"),
    [
        ({"method": "fft"}, (), ["method: unknown option in [freq_loss]", "Did you mean freq_loss_method?"]),
        ({}, ("--network_args", "dist_match=much"), ["dist_match = 'much'", "a number"]),
        ({"freq_loss_network_module": "networks.lorra"}, (), ["'networks.lorra'", "no such Python module"]),
        ({"freq_loss_levels": 4}, (), ["freq_loss_levels = 4", "8 × 8", "freq_loss_levels = 3"]),
    ],
    ids=["section", "network_args", "module", "size"],
)
def test_wrong_options_stop_before_any_model_is_loaded(sd_scripts, plain, tmp_path, freq_loss, arguments, words):
    run = sd_scripts.train(tmp_path, *arguments, freq_loss=freq_loss)
    assert run.returncode == 1
    message = run.output[run.output.index("\nfreq_loss: ") :]
    assert "Traceback" not in message
    for word in words:
        assert word in message
    assert LOADS_THE_MODEL not in run.output
    assert LOADS_THE_MODEL in plain.output
    assert not list(tmp_path.glob("*.safetensors"))


def test_options_on_the_command_line_win_and_the_rest_reaches_the_wrapped_module(sd_scripts, tmp_path):
    run = sd_scripts.train(
        tmp_path,
        "--network_args",
        "dist_match=0.02",
        "freq_loss_timesteps=own",
        "conv_dim=2",
        freq_loss={"dist_match": 0.5},
        max_train_steps=1,
    )
    assert run.returncode == 0, run.output
    assert run.metadata["ss_freq_loss_dist_match"] == "0.02"
    assert run.metadata["ss_freq_loss_timesteps"] == "own"
    # conv_dim makes networks.lora train the 3×3 convolutions of the ResNet blocks, too.
    assert any("resnets_0_conv1" in name for name in run.lora)


def test_another_network_module_is_wrapped(sd_scripts, tmp_path):
    pytest.importorskip("lycoris")
    run = sd_scripts.train(
        tmp_path,
        "--network_args",
        "algo=loha",
        "preset=attn-only",
        freq_loss={"dist_match": 0.01, "freq_loss_network_module": "lycoris.kohya"},
        max_train_steps=2,
    )
    assert run.returncode == 0, run.output
    assert any("hada_w1_a" in name for name in run.lora)
    assert run.metadata["ss_network_module"] == "lycoris.kohya"
    assert_scalars_are_the_formula(run, dist_match=0.01)


def needs(sd_scripts, file):
    if not (sd_scripts.path / file).is_file():
        pytest.skip(f"{hosts.SD_SCRIPTS.title(sd_scripts.path)} has no {file}")


@pytest.mark.parametrize("timesteps", ["unified", "shared"])
def test_inpainting(sd_scripts, tmp_path, timesteps):
    """The UNet has nine channels of input: the latents, a mask and the masked latents; its output is as always."""
    needs(sd_scripts, "inpainting_minimal_inference.py")
    options = {"dist_match": 0.01, "freq_loss_timesteps": timesteps, "freq_loss_max_timestep": 999}
    run = sd_scripts.train(tmp_path, freq_loss=options, train_inpainting=True, max_train_steps=4)
    assert run.returncode == 0, run.output
    assert "train_inpainting: expanding" in run.output
    if timesteps == "unified":
        assert_scalars_are_the_formula(run, dist_match=0.01)
    assert any(total > 0 for total in run.scalars["loss/freq_total"])


@pytest.mark.parametrize("script", ["train_leco.py", "sdxl_train_leco.py"])
@pytest.mark.parametrize("weights", [False, True], ids=["new", "continued"])
def test_scripts_that_train_on_prompts_are_refused_before_any_model_is_loaded(
    sd_scripts, plain, tmp_path, script, weights
):
    needs(sd_scripts, script)
    (tmp_path / "prompts.toml").write_text('[[prompts]]\ntarget = "a cat"\n')
    settings = {"network_weights": str(plain.folder / "lora.safetensors"), "dim_from_weights": True} if weights else {}
    prompts = ("--prompts_file", str(tmp_path / "prompts.toml"))
    run = sd_scripts.train(tmp_path, *prompts, script=script, freq_loss={"dist_match": 0.01}, **settings)
    assert run.returncode == 1, run.output
    message = run.output[run.output.index("\nfreq_loss: ") :]
    for words in (
        f"network_module = 'kohya_patch' in {script}",
        "batches of images",
        'network_module = "networks.lora"',
    ):
        assert words in message
    assert "Traceback" not in message
    assert LOADS_THE_MODEL not in run.output


def archived(commit, folder):
    """Another sd-scripts out of the checkout's own history."""
    folder.mkdir(parents=True)
    source = hosts.sd_scripts()
    found = subprocess.run(["git", "-C", source, "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True)
    if found.returncode:
        pytest.skip(f"the checkout of sd-scripts has no history back to {commit}")
    archive = subprocess.run(
        ["git", "-C", source, "archive", commit, "train_network.py", "library", "networks"],
        check=True,
        capture_output=True,
    )
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    return folder


def test_sd_scripts_without_the_hook_points_is_refused_before_any_model_is_loaded(material, plain, tmp_path):
    from runs import SdScripts

    ancient = SdScripts(archived("v0.9.1", tmp_path / "sd-scripts"), material)
    run = ancient.train(tmp_path / "run", freq_loss={"dist_match": 0.01})
    assert run.returncode != 0
    for words in ("looked for the method process_batch in NetworkTrainer", "v0.9.1 and older", "git pull"):
        assert words in run.output
    assert LOADS_THE_MODEL not in run.output
    assert LOADS_THE_MODEL in plain.output
