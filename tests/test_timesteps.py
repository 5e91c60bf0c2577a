"""Timesteps of batches that may share one, without a host."""

from __future__ import annotations

import pytest
import torch

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.training.timesteps import shared_timesteps

CONFIG = FreqLossConfig(timesteps="shared")


def uniform(count):
    return torch.randint(0, 1000, (count,))


@pytest.mark.parametrize("draw", [uniform, lambda n: 1000 * torch.sigmoid(torch.randn(n))], ids=["uniform", "sigmoid"])
def test_a_batch_shares_a_timestep_inside_the_window_or_has_its_own_outside(draw):
    shared_batches = 0
    for number in range(300):
        timesteps, shared = shared_timesteps(draw, 4, CONFIG, f"{number}")
        assert timesteps.shape == (4,)
        inside = (timesteps >= 200) & (timesteps < 600)
        if shared is None:
            assert not inside.any()
            assert len(set(timesteps.tolist())) > 1
        else:
            assert inside.all()
            assert timesteps.tolist() == [shared] * 4
            shared_batches += 1
    values = draw(20000)
    expected = ((values >= 200) & (values < 600)).float().mean().item()
    assert shared_batches / 300 == pytest.approx(expected, abs=0.11)  # four standard deviations


def test_processes_agree_on_the_decision_and_on_the_shared_timestep():
    alone = 0
    for number in range(100):
        (first, shared), (second, as_well) = (
            shared_timesteps(uniform, 3, CONFIG, f"{number}", process) for process in (0, 1)
        )
        assert shared == as_well
        if shared is None:
            alone += 1
            assert not torch.equal(first, second)
    assert 0 < alone < 100


def test_nobody_elses_random_numbers_are_used():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    shared_timesteps(uniform, 3, CONFIG, "name")
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(("window", "inside"), [((0, 1000), True), ((200, 201), False)])
def test_windows_that_hold_everything_or_almost_nothing(window, inside):
    config = FreqLossConfig(timesteps="shared", min_timestep=window[0], max_timestep=window[1])
    assert all((shared_timesteps(uniform, 2, config, f"{i}")[1] is not None) == inside for i in range(20))
