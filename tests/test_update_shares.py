"""Weights that give each noise level back its share of the updates, where some images train only from a timestep on."""

from __future__ import annotations

import pytest
import torch

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.training.least_timesteps import TimestepPools
from freq_loss_plugin.training.passes import Pass
from freq_loss_plugin.training.term import FrequencyTerm
from freq_loss_plugin.training.timesteps import Draws, SampleDistributions
from freq_loss_plugin.training.update_shares import UpdateShares

BATCH = 4


def uniform(count):
    return 1000 * torch.rand(count)


def logit_normal(count):
    return 1000 * torch.randn(count).sigmoid()


@pytest.mark.parametrize("draw", [uniform, logit_normal])
@pytest.mark.parametrize("floors", [(0, 0, 600, 850), (0, 300, 300, 300, 700), (500, 900)], ids=str)
def test_each_noise_level_has_the_share_that_it_would_have_without_floors(draw, floors):
    """By what a term chooses and weighs, for images that take turns; below all floors nothing can be trained."""
    torch.manual_seed(0)
    counts = {floor: floors.count(floor) for floor in floors}
    term = FrequencyTerm(FreqLossConfig(dist_match=0.0), "flow", seed=0, least=counts)
    bins = torch.zeros(10, dtype=torch.float64)
    total = 0.0
    for batch in range(3000):
        least = torch.tensor([floors[(BATCH * batch + place) % len(floors)] for place in range(BATCH)])
        plan = term.plan(least if least.any() else None)
        assert plan.chooses
        timesteps = term.choose(Draws(draw(BATCH), draw))
        prediction = torch.zeros(BATCH, 1, 2, 2)
        weights = term.balance(Pass(prediction, prediction, timesteps)).weights
        bins.index_add_(0, (timesteps / 100).long().clamp(max=9), weights.double())
        total += float(weights.sum())
    expected = torch.histc(draw(200_000), 10, 0, 1000).double() * torch.linspace(0, 900, 10).ge(min(floors))
    assert total / (3000 * BATCH) == pytest.approx(1, abs=0.04)
    torch.testing.assert_close(bins / bins.sum(), expected / expected.sum(), rtol=0.12, atol=0.004)


@pytest.mark.parametrize("draw", [uniform, logit_normal])
@pytest.mark.parametrize("least", [{0: 1, 800: 49}, {0: 1, 300: 1, 900: 98}, {0: 5, 900: 95}, {0: 1, 600: 1}], ids=str)
def test_no_image_weighs_more_than_ten_times_the_mean(draw, least):
    draws, shares = Draws(draw(BATCH), draw), UpdateShares(least, TimestepPools("run"))
    torch.manual_seed(0)
    total = 0.0
    for floor, count in least.items():
        timesteps = draw(400_000)
        timesteps = timesteps[timesteps >= floor]
        weights = torch.cat([shares.weights(part, draws._replace(own=part)) for part in timesteps.split(100_000)])
        assert weights.max() <= 10 * (1 + 1e-6)
        total += count * float(weights.mean())
    assert total / sum(least.values()) == pytest.approx(1, abs=0.02)


def test_a_floor_that_is_never_reached_counts_for_next_to_nothing():
    def low(count):
        return 500 * torch.rand(count)

    draws = Draws(low(3), low)
    weights = UpdateShares({0: 1, 700: 1}, TimestepPools("run")).weights(torch.tensor([10.0, 499.0, 700.0]), draws)
    assert weights[0] == weights[1] == pytest.approx(2, rel=0.01)
    assert 0 < weights[2] < 0.01


def test_where_no_floor_can_be_reached_all_weigh_1():
    def low(count):
        return 500 * torch.rand(count)

    weights = UpdateShares({700: 3}, TimestepPools("run")).weights(torch.full((2,), 700.0), Draws(low(2), low))
    assert weights.tolist() == [1, 1]


def test_samples_weigh_by_their_own_distributions():
    def draw_kind(kind, count):
        return 1000 * torch.rand(count) ** kind

    def draw(count):
        return draw_kind(1, count)

    per_sample = SampleDistributions(lambda: draw(2), torch.ones_like, (1, 3), draw_kind)
    draws = Draws(draw(2), draw, per_sample=per_sample)
    weights = UpdateShares({0: 1, 729: 1}, TimestepPools("run")).weights(torch.tensor([800.0, 800.0]), draws)
    for weight, above in zip(weights.tolist(), (1 - 0.729, 1 - 0.9), strict=True):
        assert weight == pytest.approx(2 / (1 + 1 / above), rel=0.05)


def test_without_floors_there_are_no_weights():
    term = FrequencyTerm(FreqLossConfig(dist_match=0.0), "flow", seed=0, least={0: 24})
    assert not term.plan().chooses
    prediction = torch.zeros(BATCH, 1, 2, 2)
    assert term.balance(Pass(prediction, prediction, 500.0)).weights is None
