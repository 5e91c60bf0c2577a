"""What is checked of sd-scripts and its arguments before a run: impossible options, unknown trainers."""

from __future__ import annotations

import argparse
import subprocess

import hosts
import pytest
import torch
from hooked import NAMES, NetworkTrainer, needs_module

from freq_loss_plugin import ConfigError, FreqLossConfig
from kohya_patch.host import UnsupportedTrainerError
from kohya_patch.sd_scripts import host, network
from kohya_patch.sd_scripts.timesteps import at_one_timestep
from kohya_patch.sd_scripts.trainers import TrainingRun, first_step

# The host's own warnings are none of this project's business.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_no_option_of_sd_scripts_looks_like_one_of_ours(stand_ins, name):
    args = stand_ins.make(name).args
    assert FreqLossConfig.from_mapping(args) == FreqLossConfig()


@pytest.mark.sd_scripts
@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("flux", {"freq_loss_sample_weights": "min_snr"}, ["'min_snr'", "predicts 'flow'", "'none'"]),
        ("sd3", {"freq_loss_sample_weights": "min_snr"}, ["'min_snr'", "predicts 'sample'"]),
        (
            "flux",
            {"freq_loss_timesteps": "own", "model_prediction_type": "sigma_scaled"},
            ["'own'", "'sigma_scaled'", "model_prediction_type = 'raw'", "'unified'"],
        ),
        (
            "flux",
            {"freq_loss_validation": True, "model_prediction_type": "additive"},
            ["freq_loss_validation", "'additive'", "model_prediction_type = 'raw'"],
        ),
        ("sd15", {"freq_loss_gradient_ratio": -1}, ["freq_loss_gradient_ratio = -1", ">= 0"]),
        ("sd15", {"freq_loss_grad_cosine": "yes"}, ["freq_loss_grad_cosine = 'yes'", "true or false"]),
        ("sd15", {"deepspeed": True}, ["deepspeed = true", "dist_match = 0"]),
        ("flux", {"blocks_to_swap": 10}, ["'unified'", "blocks_to_swap = 10", "'shared'"]),
        (
            "sd15",
            {"zero_terminal_snr": True, "freq_loss_max_timestep": 1000},
            ["freq_loss_max_timestep = 1000", "zero_terminal_snr", "v_parameterization"],
        ),
        ("sd15", {"freq_loss_network_module": "kohya_patch"}, ["cannot wrap itself", "networks.lora"]),
        ("sd15", {"freq_loss_network_module": "nonsense.lora"}, ["'nonsense.lora'", "no such Python module"]),
        (
            "flux",
            {"freq_loss_network_module": "networks.loha"},
            ["'networks.loha'", "this trainer is FLUX / Chroma", "SDXL and Anima only", "'lycoris.kohya'"],
        ),
        ("sd15", {"resolution": "16,64", "freq_loss_levels": 2}, ["freq_loss_levels = 2", "2 × 2"]),
        ("sd15", {"network_args": ["freq_loss_metod=fft"]}, ["freq_loss_metod", "Did you mean freq_loss_method?"]),
        ("sd15", {"network_args": ["dist_match=none"]}, ["dist_match = 'none'", "a number"]),
        ("sd15", {"network_args": ["dist_match=1", "dist_match=2"]}, ["dist_match is given twice", "keep one"]),
        ("sd15", {"network_args": ["dist_match"]}, ["'dist_match'", "expected key=value"]),
        (
            "sd15",
            {"guidance_token": 8.0, "train_data_dir": "/nowhere"},
            ["train_data_dir = '/nowhere'", "no such folder"],
        ),
        ("sdxl", {"guidance_token": 8.0}, ["guidance_token = 8", "this trainer is SDXL", "set guidance_token = 0"]),
        ("flux", {"guidance_token": 8.0}, ["guidance_token = 8", "this trainer is FLUX", "set guidance_token = 0"]),
    ],
)
def test_combinations_that_cannot_work_are_refused(stand_ins, name, settings, words):
    needs_module(settings.get("freq_loss_network_module"))
    stand_in = stand_ins.make(name, **settings)
    with pytest.raises(ConfigError) as caught:
        network.check(TrainingRun(stand_in.trainer, stand_in.args))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_every_trainer_passes_the_check_and_names_its_own_lora(stand_ins, name):
    stand_in = stand_ins.make(name)
    training = TrainingRun(stand_in.trainer, stand_in.args)
    assert network.check(training).enabled
    path = hosts.sd_scripts() / (training.family.network_module.replace(".", "/") + ".py")
    assert path.is_file()


@pytest.mark.sd_scripts
def test_an_error_names_the_version_that_was_found_and_those_that_work(stand_ins):
    found = str(host.SD_SCRIPTS.unsupported(type(stand_ins.make("sdxl").trainer), "a method", "none"))
    command = ["git", "-C", str(hosts.sd_scripts()), "log", "-1", "--format=%H %cs"]
    commit, date = subprocess.run(command, capture_output=True, text=True).stdout.split()
    for word in (commit[:7], date, str(hosts.sd_scripts()), "(commit d0b5c0e5) to v0.11.1", "dev branch at 37a1cbb"):
        assert word in found


def test_the_run_is_found_on_the_stack_and_nowhere_else():
    trainer, args = NetworkTrainer(), argparse.Namespace()
    found = trainer.train(args)
    assert found.trainer is trainer
    assert found.args is args
    assert TrainingRun.find() is None
    with pytest.raises(UnsupportedTrainerError, match="no training of sd-scripts is running"):
        network.create_network(1.0, 4, 4, None, None, None)


@pytest.mark.parametrize("missing", ["process_batch", "get_noise_pred_and_target", "all_reduce_network"])
def test_a_missing_method_is_named(missing):
    outdated = type("NetworkTrainer", (NetworkTrainer,), {missing: None})
    with pytest.raises(UnsupportedTrainerError, match=rf"method {missing} .*v0\.9\.1 and older.*git pull"):
        host.SD_SCRIPTS.check_methods(outdated, host.METHODS)


def test_a_missing_parameter_is_named():
    class Moved(NetworkTrainer):
        def get_noise_pred_and_target(self, args, clean, text_encoder_conds, is_train=True): ...

    with pytest.raises(
        UnsupportedTrainerError,
        match=r"latents among the parameters of Moved\.get_noise_pred_and_target, and found self, args, clean, ",
    ):
        host.SD_SCRIPTS.check_methods(Moved, host.METHODS)
    host.SD_SCRIPTS.check_methods(NetworkTrainer, host.METHODS)


def test_a_trainer_that_logs_in_another_way_cannot_validate_in_bands():
    with pytest.raises(UnsupportedTrainerError, match="the method accelerator_logging"):
        host.SD_SCRIPTS.check_methods(NetworkTrainer, host.VALIDATION_METHODS)


def test_subclasses_belong_to_the_nearest_family():
    flux = type("FluxNetworkTrainer", (NetworkTrainer,), {})
    special = type("MyFluxTrainer", (flux,), {})
    assert TrainingRun(special(), argparse.Namespace()).family.name == "FLUX / Chroma"
    assert TrainingRun(NetworkTrainer(), argparse.Namespace()).family.name == "SD1.x / SD2.x"


@pytest.mark.parametrize("timestep", [0, 1, 200, 599, 999])
def test_one_timestep_by_the_flow_trainers_own_formula(timestep):
    args = argparse.Namespace(min_timestep=None, max_timestep=None, timestep_sampling="sigma", untouched=5)
    fixed = at_one_timestep(args, timestep)
    x = torch.sigmoid(fixed.sigmoid_scale * (torch.randn(4) + torch.tensor([0, 0.5, -0.5, 3])))
    sigma = x * fixed.discrete_flow_shift / (1 + (fixed.discrete_flow_shift - 1) * x)
    torch.testing.assert_close(sigma, torch.full((4,), timestep / 1000), rtol=1e-5, atol=1e-7)
    assert fixed.min_timestep == fixed.max_timestep == timestep
    assert args.min_timestep is None
    assert fixed.untouched == 5


def test_the_first_step_of_a_resumed_run(tmp_path):
    (tmp_path / "train_state.json").write_text('{"current_epoch": 2, "current_step": 40}')
    assert first_step(argparse.Namespace()) == 0
    assert first_step(argparse.Namespace(resume=str(tmp_path))) == 40
    assert first_step(argparse.Namespace(resume=str(tmp_path / "elsewhere"))) == 0
    assert first_step(argparse.Namespace(resume=str(tmp_path), initial_step=7)) == 7
