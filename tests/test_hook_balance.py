"""`freq_loss_balance` in the trainers of sd-scripts, on single batches."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from hooked import NAMES, install

from freq_loss_plugin import ConfigError, FreqLossConfig
from kohya_patch.sd_scripts import balance
from kohya_patch.sd_scripts.trainers import FAMILIES

# The host's own warnings are none of this project's business.
pytestmark = pytest.mark.filterwarnings("default")

KINDS = {"timestep": {"balance": "timestep"}, "band": {"balance": "band", "method": "fft"}}


def record_losses(trainer):
    """The losses of the samples of every batch, as sd-scripts leaves them."""
    recorded, post_process_loss = [], trainer.post_process_loss

    def recording(*arguments, **named):
        recorded.append(post_process_loss(*arguments, **named).detach())
        return recorded[-1]

    trainer.post_process_loss = recording
    return recorded


def weights_at(hook, name, timesteps):
    at = timesteps.float() * (1000 if name == "anima" else 1)
    weights = hook.term.state_dict()  # on the way that a saved state takes
    assert weights["balance.counts"].sum() > 0
    return hook.term._loss_balance.weights().numpy()[:, (at.numpy() // 50).clip(0, 19).astype(int)]


@pytest.mark.sd_scripts
@pytest.mark.parametrize("dist_match", [0.0, 0.1])
@pytest.mark.parametrize(
    "settings", [{}, {"loss_type": "huber", "huber_schedule": "constant"}, {"masked_loss": True}], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_timestep_weighs_the_losses_of_the_samples(stand_ins, name, settings, dist_match):
    stand_in = stand_ins.make(name, **settings)
    stand_in.batch["loss_weights"] = torch.tensor([1.0, 0.5, 1.0])
    stand_in.batch["alpha_masks"] = (
        torch.ones(3, 128, 96) * torch.linspace(0.2, 1, 96) if settings.get("masked_loss") else None
    )
    plain = [stand_in.process_batch(seed=seed).item() for seed in range(4)]
    losses = record_losses(stand_in.trainer)
    hook = install(stand_in, FreqLossConfig(dist_match=dist_match, timesteps="own", balance="timestep"))
    for seed in range(4):
        loss = stand_in.process_batch(seed=seed)
        metrics = hook.term.settle(seed + 1)
        weights = weights_at(hook, name, stand_in.passes[-1][2])[0]
        expected = (losses[-1].numpy() * weights).mean()
        assert loss.item() - metrics.total == pytest.approx(expected, rel=1e-4)
        assert losses[-1].mean().item() == pytest.approx(plain[seed], rel=1e-6)


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_band_filters_the_residual(stand_ins, name):
    stand_in = stand_ins.make(name)
    hook = install(stand_in, FreqLossConfig(dist_match=0.0, balance="band", method="fft"))
    for seed in range(4):
        loss = stand_in.process_batch(seed=seed)
        prediction, target, timesteps = stand_in.passes[-1]
        weights = weights_at(hook, name, timesteps)
        bands = oracle.fft_bands((prediction - target).double().numpy())
        filtered = sum(np.sqrt(w)[:, None, None, None] * band for w, band in zip(weights, bands, strict=True))
        assert loss.item() == pytest.approx((filtered**2).mean(), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, stand_in.denoiser.mix)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.sd_scripts
@pytest.mark.parametrize("kind", KINDS)
def test_validation_is_not_weighted(stand_ins, kind):
    stand_in = stand_ins.make("sd15")
    plain = stand_in.process_batch(is_train=False)
    install(stand_in, FreqLossConfig(dist_match=0.0, **KINDS[kind]))
    for _ in range(3):
        stand_in.process_batch()
    assert torch.equal(stand_in.process_batch(is_train=False), plain)


@pytest.mark.sd_scripts
@pytest.mark.parametrize("timesteps", ["unified", "shared", "own"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_and_timesteps_of_the_trainer_stay_the_same(stand_ins, kind, timesteps):
    passes = []
    for options in ({"balance": "off"}, KINDS[kind]):
        stand_in = stand_ins.make("sd15")
        install(stand_in, FreqLossConfig(dist_match=0.1, timesteps=timesteps, **options))
        stand_in.process_batch()
        passes.append(stand_in.passes[-1])
    for one, other in zip(*passes, strict=True):
        assert torch.equal(one, other)


@pytest.mark.sd_scripts
def test_without_a_term_only_the_balance_is_logged(stand_ins):
    stand_in = stand_ins.make("sd15")
    hook = install(stand_in, FreqLossConfig(dist_match=0.0, balance="timestep"))
    stand_in.process_batch()
    hook._end_step()
    prediction, target, _ = stand_in.passes[-1]
    assert hook._logs == {"loss/balance_unweighted": pytest.approx((prediction - target).square().mean().item())}


@pytest.mark.sd_scripts
def test_the_weights_are_drawn_in_tensorboard(stand_ins, tmp_path):
    from accelerate import Accelerator
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stand_in = stand_ins.make("sd15")
    stand_in.accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    stand_in.accelerator.init_trackers("balance")
    hook = install(stand_in, FreqLossConfig(dist_match=0.0, balance="band"))
    for _ in range(3):
        stand_in.process_batch()
        hook._end_step()
    stand_in.accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "balance")).Reload()
    assert [event.step for event in events.Images("loss/balance_weights")] == [1]


@pytest.mark.parametrize(
    ("trainer", "arguments", "named"),
    [
        ("NetworkTrainer", {"min_snr_gamma": 5.0}, "min_snr_gamma = 5.0"),
        ("SdxlNetworkTrainer", {"debiased_estimation_loss": True}, "debiased_estimation_loss = True"),
        ("FluxNetworkTrainer", {"weighting_scheme": "sigma_sqrt"}, "weighting_scheme = 'sigma_sqrt'"),
        ("FluxNetworkTrainer", {"model_prediction_type": "sigma_scaled"}, "model_prediction_type = 'sigma_scaled'"),
    ],
)
def test_other_weightings_by_noise_level_are_refused(trainer, arguments, named):
    config = FreqLossConfig(balance="band")
    with pytest.raises(ConfigError, match=named):
        balance.check(config, SimpleNamespace(**arguments), FAMILIES[trainer])
    fine = {"weighting_scheme": "logit_normal", "min_snr_gamma": None, "model_prediction_type": "raw"}
    balance.check(config, SimpleNamespace(**fine), FAMILIES[trainer])
