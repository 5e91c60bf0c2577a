"""Real runs: the scripts of an unmodified sd-scripts train an SD1.5-shaped model on photos."""

from __future__ import annotations

import oracle
import pytest
import torch
from recorded_runs import ALPHAS, assert_scalars_are_the_formula, needs

pytestmark = [pytest.mark.sd_scripts, pytest.mark.long]


@pytest.fixture(scope="session")
def unified(sd_scripts, tmp_path_factory):
    """The two lines of the README: nothing but the network module and dist_match."""
    run = sd_scripts.train(tmp_path_factory.mktemp("unified"), freq_loss={"dist_match": 0.003})
    assert run.returncode == 0, run.output
    return run


@pytest.mark.versions
def test_off_is_bit_identical_to_sd_scripts_without_the_plugin(sd_scripts, plain_run, tmp_path):
    off = sd_scripts.train(tmp_path, freq_loss={"dist_match": 0})
    assert off.returncode == 0, off.output
    torch.testing.assert_close(off.lora, plain_run.lora, rtol=0, atol=0)
    assert off.scalars == plain_run.scalars
    assert off.metadata["ss_network_module"] == "networks.lora"
    assert not [key for key in off.metadata if key.startswith("ss_freq_loss")]
    assert "dist_match = 0" in off.output


@pytest.mark.versions
def test_on_adds_the_formula_and_leaves_the_base_pass_alone(plain_run, unified):
    assert_scalars_are_the_formula(unified, dist_match=0.003)
    drawn = []
    for batch, untouched in zip(unified.batches(), plain_run.batches(), strict=True):
        # The target is the noise: the base pass sees the same noise and timesteps as without the plug-in.
        assert torch.equal(batch["base"]["target"], untouched["base"]["target"])
        assert torch.equal(batch["base"]["timesteps"], untouched["base"]["timesteps"])
        assert not torch.equal(batch["extra"]["target"], batch["base"]["target"])
        (timestep,) = set(batch["extra"]["timesteps"].tolist())
        drawn.append(timestep)
    assert all(200 <= timestep < 600 for timestep in drawn)
    assert len(set(drawn)) > 1
    assert any(not torch.equal(unified.lora[name], plain_run.lora[name]) for name in plain_run.lora)


def test_the_file_is_an_ordinary_lora_with_the_options_in_its_metadata(plain_run, unified):
    assert unified.lora.keys() == plain_run.lora.keys()
    assert unified.metadata["ss_network_module"] == "networks.lora"
    assert unified.metadata["ss_freq_loss_dist_match"] == "0.003"
    assert unified.metadata["ss_freq_loss_resolved_method"] == "wavelet"
    from freq_loss_plugin import FreqLossConfig, __version__

    assert unified.metadata["ss_freq_loss_version"] == __version__
    assert FreqLossConfig().metadata().keys() <= unified.metadata.keys()


def test_the_output_has_the_options_and_later_the_fraction_of_the_loss(unified):
    output = " ".join(unified.output.split())
    assert output.count("on for SD1.x / SD2.x (prediction type epsilon)") == 1
    assert "freq_loss_method = wavelet freq_loss_wavelet = db3 freq_loss_levels = 2" in output
    assert "cost: one extra forward and backward pass per batch" in output
    # After the last step here, because the run is shorter than 50.
    assert "up to step 4 the frequency" in output
    assert "too little to act; multiply" in output


def test_own_timesteps_with_every_feature_that_concerns_the_hook(sd_scripts, material, tmp_path):
    """v-prediction, zero terminal SNR, min-SNR, FFT, regularization images, alpha masks and accumulation at once."""
    import material as make

    make.make_photos(tmp_path / "masked", 64, alpha=True)
    window = {"freq_loss_min_timestep": 100, "freq_loss_max_timestep": 950}
    options = {"dist_match": 0.05, "freq_loss_timesteps": "own", "freq_loss_method": "fft", **window}
    options["freq_loss_sample_weights"] = "min_snr"
    run = sd_scripts.train(
        tmp_path / "run",
        freq_loss=options,
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
    alphas = oracle.zero_terminal_snr(ALPHAS)

    def weigh(timestep):
        snr = alphas[timestep] / (1 - alphas[timestep])
        return float(100 <= timestep < 950) * min(snr, 5.0) / (snr + 1)

    batches = run.batches()
    assert len(batches) == 6
    assert all("extra" not in batch for batch in batches)
    assert any((batch["loss_weights"] == 0.5).any() for batch in batches)
    assert all("alpha_masks" in batch for batch in batches)
    assert_scalars_are_the_formula(
        run,
        dist_match=0.05,
        bands=oracle.fft_bands,
        prediction_type="v_prediction",
        alphas=alphas,
        weigh=weigh,
        accumulation=2,
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


@pytest.mark.versions
def test_two_processes_form_one_batch_at_the_same_timestep_with_different_noise(sd_scripts, tmp_path):
    """Without a seed, which sd-scripts then draws in each process."""
    run = sd_scripts.train(tmp_path, freq_loss={"dist_match": 0.01}, processes=2, max_train_steps=2, seed=None)
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


def test_the_command_line_takes_precedence_and_other_arguments_reach_the_wrapped_module(sd_scripts, tmp_path):
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


@pytest.mark.parametrize("named_by", ["option", "toml"])
def test_another_network_module_is_wrapped(sd_scripts, tmp_path, named_by):
    """Named by the option, or by the TOML of a GUI, where the command line replaces it by ours."""
    pytest.importorskip("lycoris")
    option = {"freq_loss_network_module": "lycoris.kohya"} if named_by == "option" else {}
    toml = {} if named_by == "option" else {"network_module": "lycoris.kohya"}
    run = sd_scripts.train(
        tmp_path,
        *([] if named_by == "option" else ["--network_module", "kohya_patch"]),
        "--network_args",
        "algo=loha",
        "preset=attn-only",
        freq_loss={"dist_match": 0.01, **option},
        max_train_steps=2,
        **toml,
    )
    assert run.returncode == 0, run.output
    assert any("hada_w1_a" in name for name in run.lora)
    assert run.metadata["ss_network_module"] == "lycoris.kohya"
    assert_scalars_are_the_formula(run, dist_match=0.01)


@pytest.mark.parametrize("timesteps", ["unified", "shared"])
def test_inpainting(sd_scripts, tmp_path, timesteps):
    """The UNet has nine input channels (latents, mask, masked latents) and the usual four output channels."""
    needs(sd_scripts, "inpainting_minimal_inference.py")
    options = {"dist_match": 0.01, "freq_loss_timesteps": timesteps, "freq_loss_max_timestep": 999}
    run = sd_scripts.train(tmp_path, freq_loss=options, train_inpainting=True, max_train_steps=4)
    assert run.returncode == 0, run.output
    assert "train_inpainting: expanding" in run.output
    if timesteps == "unified":
        assert_scalars_are_the_formula(run, dist_match=0.01)
    assert any(total > 0 for total in run.scalars["loss/freq_total"])
