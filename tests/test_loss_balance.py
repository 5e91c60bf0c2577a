"""`freq_loss_balance`: the weights of the base loss, against an independent computation in NumPy."""

from __future__ import annotations

import forks
import numpy as np
import oracle
import pytest
import torch
from balance_oracle import Expected

from freq_loss_plugin import ConfigError, FreqLossConfig
from freq_loss_plugin.training.loss_balance import LossBalance
from freq_loss_plugin.training.passes import Pass

MODES = ["timestep", "band"]


def batches(count, seed=0, size=4):
    """Residuals that are larger at small timesteps, as those of a model that predicts the noise."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        timesteps = torch.randint(0, 1000, (size,), generator=generator)
        residual = torch.randn(size, 4, 16, 16, generator=generator)
        yield residual * torch.exp(-timesteps / 300).view(-1, 1, 1, 1), timesteps


def passed(residual, timesteps, mask=None):
    target = torch.randn(residual.shape, generator=torch.Generator().manual_seed(5))
    return Pass((target + residual).requires_grad_(), target, timesteps, mask=mask)


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_the_weights_are_the_formula(mode, power):
    balance = LossBalance(FreqLossConfig(balance=mode, balance_power=power))
    expected = Expected(mode, power)
    for residual, timesteps in batches(30):
        weighed = balance.balance(passed(residual, timesteps))
        expected.observe(residual.double().numpy(), timesteps.tolist())
        weights = expected.weights()
        np.testing.assert_allclose(balance.weights().numpy(), weights, rtol=1e-4)
        of_samples = weights[:, timesteps.numpy() // 50]
        if mode == "timestep":
            np.testing.assert_allclose(weighed.weights.numpy(), of_samples[0], rtol=1e-4)
            continue
        assert weighed.weights is None
        bands = oracle.wavelet_bands(residual.double().numpy())
        filtered = sum(np.sqrt(of_samples[b])[:, None, None, None] * bands[b] for b in range(2))
        target = passed(residual, timesteps).target
        np.testing.assert_allclose((weighed.prediction - target).detach().numpy(), filtered, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_mean_loss_stays_what_it_was_and_noise_levels_count_more_alike(mode):
    balance = LossBalance(FreqLossConfig(balance=mode))
    plain, weighted, of_halves = [], [], {False: [], True: []}
    for residual, timesteps in batches(400):
        weighed = balance.balance(passed(residual, timesteps))
        target = passed(residual, timesteps).target
        losses = (weighed.prediction.detach() - target).square().mean(dim=(1, 2, 3))
        losses = losses if weighed.weights is None else losses * weighed.weights
        plain.append(residual.square().mean().item())
        weighted.append(losses.mean().item())
        for t, loss, old in zip(timesteps, losses, residual.square().mean(dim=(1, 2, 3)), strict=True):
            of_halves[bool(t >= 500)].append((loss.item(), old.item()))
    assert np.mean(weighted[100:]) == pytest.approx(np.mean(plain[100:]), rel=0.05)
    assert max(weighted) < 3 * max(plain)  # no spikes, the first steps included
    (low_new, low_old), (high_new, high_old) = (np.mean(of_halves[half], axis=0) for half in (False, True))
    assert low_new / high_new < 0.5 * low_old / high_old


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_is_that_of_the_weighted_loss(mode):
    balance = LossBalance(FreqLossConfig(balance=mode, method="fft"))
    residual, timesteps = next(batches(1))
    sample = passed(residual, timesteps)
    weighed = balance.balance(sample)
    losses = (weighed.prediction - sample.target).square().mean(dim=(1, 2, 3))
    (losses if weighed.weights is None else losses * weighed.weights).mean().backward()
    weights = balance.weights().double().numpy()[:, timesteps.numpy() // 50]
    bands = [residual.double().numpy()] if mode == "timestep" else oracle.fft_bands(residual.double().numpy())
    expected = sum(w[:, None, None, None] * band for w, band in zip(weights, bands, strict=True)) * 2 / residual.numel()
    np.testing.assert_allclose(sample.prediction.grad.numpy(), expected, rtol=1e-3, atol=1e-7)


def test_a_mask_leaves_the_size_of_the_loss_alone():
    """Half of each image is masked; its running means are those of the other half."""
    balance, expected = LossBalance(FreqLossConfig(balance="timestep")), Expected("timestep")
    mask = torch.zeros(4, 1, 16, 16)
    mask[..., :8] = 1
    for residual, timesteps in batches(5):
        balance.balance(passed(residual, timesteps, mask))
        expected.observe(residual.double().numpy(), timesteps.tolist(), mask.numpy())
    np.testing.assert_allclose(balance.weights().numpy(), expected.weights(), rtol=1e-4)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_samples_without_a_finite_loss_leave_the_running_means_alone(broken):
    balance = LossBalance(FreqLossConfig(balance="band"))
    for residual, timesteps in batches(3):
        balance.balance(passed(residual, timesteps))
    before = balance.weights()
    residual, timesteps = next(batches(1, seed=9))
    balance.balance(passed(residual * broken, timesteps))
    torch.testing.assert_close(balance.weights(), before)


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_has_the_same_weights(mode):
    config = FreqLossConfig(balance=mode)
    whole, first, resumed = LossBalance(config), LossBalance(config), LossBalance(config)
    for number, (residual, timesteps) in enumerate(batches(20)):
        whole.balance(passed(residual, timesteps))
        (first if number < 10 else resumed).balance(passed(residual, timesteps))
        if number == 9:
            resumed.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    assert torch.equal(resumed.weights(), whole.weights())


def test_half_precision_has_the_weights_of_float32():
    exact, half = (LossBalance(FreqLossConfig(balance="band")) for _ in range(2))
    for residual, timesteps in batches(5):
        prediction, target = (tensor.bfloat16() for tensor in (residual + 3, torch.full_like(residual, 3)))
        in_full = exact.balance(Pass(prediction.float(), target.float(), timesteps))
        in_half = half.balance(Pass(prediction, target, timesteps))
        assert torch.equal(in_half.prediction, in_full.prediction)  # nothing is rounded once more
    assert torch.equal(half.weights(), exact.weights())


def work(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    balance = LossBalance(FreqLossConfig(balance="band"))
    for residual, timesteps in batches(10):
        mine = slice(0, 1) if rank else slice(1, None)  # of different sizes
        balance.balance(Pass(residual[mine], torch.zeros_like(residual[mine]), timesteps[mine]))
    torch.save(balance.weights(), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_weights_of_one_with_both_batches(tmp_path):
    forks.spawn(work, (str(tmp_path),), 2)
    balance = LossBalance(FreqLossConfig(balance="band"))
    for residual, timesteps in batches(10):
        balance.balance(Pass(residual, torch.zeros_like(residual), timesteps))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / str(rank)), balance.weights())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"freq_loss_balance": "bands"}, "freq_loss_balance = 'bands'"),
        ({"freq_loss_balance_power": 0.0}, "freq_loss_balance_power = 0.0"),
        ({"freq_loss_balance_power": 1.5}, "freq_loss_balance_power = 1.5"),
    ],
)
def test_impossible_values_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        FreqLossConfig.from_mapping(options)
