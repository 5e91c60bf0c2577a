"""The mode ``shared`` on every trainer class of sd-scripts: the formula, and the distribution of the timesteps."""

from __future__ import annotations

import inspect

import hosts
import numpy as np
import pytest
import torch
from hooked import NAMES, expected_bands, install
from scipy.stats import ks_2samp

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.training.timesteps import shared_timesteps
from kohya_patch.sd_scripts import host
from kohya_patch.sd_scripts.timesteps import TimestepChoice
from kohya_patch.sd_scripts.trainers import FAMILIES

# The host's own warnings are none of this project's business.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_shared_adds_the_formula_where_the_batch_shares_a_timestep(stand_ins, name):
    stand_in = stand_ins.make(name)
    config = FreqLossConfig(dist_match=0.1, timesteps="shared")
    hook = install(stand_in, config)
    stand_in.denoiser.calls, seen = 0, set()
    for count in range(1, 21):
        loss = stand_in.process_batch()
        assert stand_in.denoiser.calls == len(stand_in.passes) * count == count
        timesteps = stand_in.passes[0][2].float() * (1000 if name == "anima" else 1)
        inside = (timesteps.round() >= 200) & (timesteps.round() < 600)
        numbers = hook.term.settle(1)
        seen.add(bool(inside.all()))
        if not inside.all():
            assert not inside.any() or name == "hunyuan_image"  # cut to whole numbers: 199.9 may read 199
            assert numbers.total == 0
            continue
        assert (timesteps - timesteps[0]).abs().max() < 1e-3
        low, high = expected_bands(stand_in, stand_in.passes[0])
        tolerance = 0.02 if name == "hunyuan_image" else 1e-4
        assert numbers.total == pytest.approx(0.1 * (0.7 * low + 0.3 * high), rel=tolerance)
        assert loss.item() == pytest.approx(numbers.base + numbers.total, rel=1e-5)
    assert seen == {True, False}
    (gradient,) = torch.autograd.grad(loss, stand_in.denoiser.mix)
    assert gradient.isfinite().all()


def are_distributed_alike(a, b):
    return ks_2samp(a, b, method="asymp").pvalue > 0.001


def drawing_of(stand_in):
    """How the trainer draws n timesteps for a batch like its own."""
    draws = []

    def choose(of_batch):
        draws.append(of_batch.draw)
        return of_batch.own

    trainer = type(stand_in.trainer)
    prediction = FAMILIES[trainer.__name__].kind
    with TimestepChoice(prediction, host.drawing_function(trainer, prediction)).made_by(choose, "stream"):
        stand_in.process_batch()
    return draws[0]


# What the trainers can draw from: uniform, min/max_timestep, and the samplings and weightings with shapes of their own.
DISTRIBUTIONS = [
    ("sd15", {}),
    ("sdxl", {"min_timestep": 100, "max_timestep": 700}),
    ("sd3", {"weighting_scheme": "logit_normal", "logit_mean": -0.5, "logit_std": 1.0, "training_shift": 2.0}),
    ("flux", {"timestep_sampling": "sigmoid"}),
    ("flux", {"timestep_sampling": "flux_shift"}),
    ("flux", {"timestep_sampling": "sigma", "weighting_scheme": "mode", "mode_scale": 1.29}),
    ("lumina", {"timestep_sampling": "nextdit_shift"}),
    ("hunyuan_image", {"timestep_sampling": "shift", "discrete_flow_shift": 3.0}),
    ("anima", {"timestep_sampling": "uniform"}),
]


@pytest.mark.sd_scripts
@pytest.mark.parametrize(
    ("name", "arguments"), DISTRIBUTIONS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_shared_timesteps_are_distributed_as_the_trainer_draws_them(stand_ins, name, arguments):
    """2,000 batches of three against 20,000 timesteps of the trainer's own function."""
    stand_in = stand_ins.make(name, **arguments)
    config = FreqLossConfig(dist_match=0.1, timesteps="shared")
    draw = drawing_of(stand_in)
    expected = torch.cat([draw(500) for _ in range(40)])
    found, alone = [], []
    for number in range(2000):
        timesteps, shared = shared_timesteps(draw, 3, config, str(number))
        found.append(timesteps.float())
        if shared is None:
            alone.append(len(set(timesteps.tolist())))
    # One test for each place in the batch: within a batch they are not independent.
    for place in (0, 2):
        assert are_distributed_alike(torch.stack(found)[:, place].numpy(), expected.float().numpy())
    inside = ((expected >= 200) & (expected < 600)).float().mean().item()
    assert 1 - len(alone) / 2000 == pytest.approx(inside, abs=4 * (inside * (1 - inside) / 2000) ** 0.5 + 0.01)
    assert np.mean(alone) > 2.5


# In dev versions of sd-scripts a subset can ask for an offset of its images' timesteps.
OFFSETS = [-1.0, 0.5, 0.0]


def with_offsets(stand_ins, name, **arguments):
    stand_in = stand_ins.make(name, **arguments)
    drawing = host.drawing_function(type(stand_in.trainer), "flow")
    if host.OFFSET not in inspect.signature(drawing.function).parameters:
        pytest.skip(f"{hosts.SD_SCRIPTS.title(hosts.sd_scripts())} has no {host.OFFSET}")
    stand_in.batch["custom_attributes"] = [{"timestep_sampling": {"offset": offset}} for offset in OFFSETS]
    return stand_in


@pytest.mark.sd_scripts
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("flux", {"timestep_sampling": "sigmoid", "sigmoid_scale": 1.3}),
        ("flux", {"timestep_sampling": "flux_shift"}),
        ("anima", {"timestep_sampling": "shift", "discrete_flow_shift": 3.0}),
        ("flux", {"timestep_sampling": "sigma"}),  # heeds no offset
        ("hunyuan_image", {"timestep_sampling": "sigmoid"}),  # reads none
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_shared_timesteps_keep_the_offset_of_each_sample(stand_ins, name, arguments):
    """1,000 batches of the trainer alone, and 1,000 with the hook: each sample's timesteps are distributed alike."""
    scale = 1000 if name == "anima" else 1
    found = {}
    for is_hooked in (False, True):
        stand_in = with_offsets(stand_ins, name, **arguments)
        if is_hooked:
            install(stand_in, FreqLossConfig(dist_match=0.1, timesteps="shared"))
        together, drawn = [], []
        for seed in range(1000):
            stand_in.process_batch(seed=seed)
            timesteps = stand_in.passes[0][2].float() * scale
            drawn.append(timesteps)
            if is_hooked:
                together.append(((timesteps - timesteps[2]).abs() < 1e-3)[:2].float())
        found[is_hooked] = torch.stack(drawn).numpy()
    for place in range(3):
        assert are_distributed_alike(found[False][:, place], found[True][:, place])
    means = found[False].mean(axis=0)
    heeded = name != "hunyuan_image" and arguments["timestep_sampling"] != "sigma"
    assert (means[0] < means[2] - 50) == (means[1] > means[2] + 50) == heeded
    # In the window most samples take the timestep that they would all take without offsets.
    in_window = torch.stack(together)[torch.tensor((found[True][:, 2] >= 200) & (found[True][:, 2] < 600))]
    assert (in_window.mean(dim=0) > (0.4 if heeded else 0.99)).all()


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", ["flux", "anima"])
def test_the_term_of_a_shared_timestep_is_that_of_the_samples_that_take_it(stand_ins, name):
    stand_in = with_offsets(stand_ins, name, timestep_sampling="sigmoid")
    hook = install(stand_in, FreqLossConfig(dist_match=0.1, timesteps="shared"))
    taken = set()
    for _ in range(60):
        stand_in.process_batch()
        numbers = hook.term.settle(1)
        prediction, target, timesteps = stand_in.passes[0]
        takes = (timesteps - timesteps[2]).abs() < 1e-6
        if numbers.total == 0:
            continue
        taken.add(tuple(takes.tolist()))
        stand_in.batch["loss_weights"] = takes.float()
        low, high = expected_bands(stand_in, (prediction, target, timesteps))
        stand_in.batch["loss_weights"] = torch.ones(3)
        assert numbers.total == pytest.approx(0.1 * (0.7 * low + 0.3 * high), rel=1e-4)
    assert len(taken) > 1


@pytest.mark.sd_scripts
@pytest.mark.parametrize("mode", ["unified", "shared"])
@pytest.mark.parametrize("name", ["flux", "anima"])
def test_an_offset_moves_no_timestep_that_was_asked_for_and_no_other_random_number(stand_ins, name, mode):
    stand_in = with_offsets(stand_ins, name, timestep_sampling="shift", discrete_flow_shift=3.0)
    stand_in.process_batch()
    base_pass, next_draw = stand_in.passes[0], torch.rand(3)
    install(stand_in, FreqLossConfig(dist_match=0.1, timesteps=mode))
    stand_in.process_batch()
    assert torch.equal(torch.rand(3), next_draw)
    if mode == "unified":
        extra, first = stand_in.passes
        assert (extra[2] - extra[2][0]).abs().max() < 1e-6
        assert torch.equal(first[2], base_pass[2])
