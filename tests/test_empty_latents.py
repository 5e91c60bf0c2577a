"""Timesteps drawn for empty latents are those drawn for real ones of that size, by each host's own function."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch

from kohya_patch.empty_latents import EmptyLatents

sys.path.insert(0, str(Path(__file__).parent / "musubi_host"))

SIZE = (64, 48)


def test_they_say_their_size_and_hold_one_number_for_each_sample():
    empty = EmptyLatents.of(1000, (256, 128))
    assert empty.shape == empty.size() == (1000, 1, 256, 128)
    assert (empty.size(0), empty.size(-1), empty.size(dim=2), len(empty)) == (1000, 128, 256, 1000)
    assert EmptyLatents.of(2, (9, 16, 16)).ndim == 5
    mixed = (1 - torch.rand(1000).view(-1, 1, 1, 1)) * empty
    assert type(mixed) is torch.Tensor
    assert mixed.shape == (1000, 1, 1, 1)


def draws_alike(method, given):
    """The same timesteps for real latents and for empty ones, and others for another size where that matters."""
    drawn = []
    for latents in (torch.zeros(64, 1, *SIZE), EmptyLatents.of(64, SIZE)):
        torch.manual_seed(5)
        drawn.append(method(**{**given, "latents": latents, "noise": latents})[1])
    return torch.equal(*drawn)


SD_SCRIPTS = [
    ("flux", "sigma"),
    ("flux", "uniform"),
    ("flux", "sigmoid"),
    ("flux", "shift"),
    ("flux", "flux_shift"),
    ("lumina", "nextdit_shift"),
    ("lumina", "flux_shift"),
    ("hunyuan_image", "flux_shift"),
    ("anima", "flux_shift"),
    ("sd3", None),
]


@pytest.mark.sd_scripts
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "sampling"), SD_SCRIPTS)
def test_in_sd_scripts(stand_ins, name, sampling):
    from kohya_patch.sd_scripts import host
    from kohya_patch.sd_scripts.trainers import FAMILIES

    stand_in = stand_ins.make(name, timestep_sampling=sampling)
    trainer = type(stand_in.trainer)
    function = host.drawing_function(trainer, FAMILIES[trainer.__name__].kind).function
    given = {"args": stand_in.args, "device": torch.device("cpu"), "dtype": torch.float32}
    if "noise_scheduler" in inspect.signature(function).parameters:
        given["noise_scheduler"] = stand_in.scheduler
    assert draws_alike(function, given)


@pytest.mark.musubi_tuner
@pytest.mark.filterwarnings("default")
def test_in_musubi_tuner():
    import musubi_stand_ins
    from test_musubi_hook import SAMPLINGS

    for sampling in SAMPLINGS:
        stand_in = musubi_stand_ins.make("flux_2", timestep_sampling=sampling)
        given = {"args": stand_in.args, "timesteps": None, "noise_scheduler": stand_in.scheduler}
        given |= {"device": torch.device("cpu"), "dtype": torch.float32}
        assert draws_alike(stand_in.trainer.get_noisy_model_input_and_timesteps, given), sampling
