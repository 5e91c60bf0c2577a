"""Timesteps above a least one, and what the frequency term makes of images that have one."""

from __future__ import annotations

import functools

import pytest
import torch
from scipy import stats

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.training.least_timesteps import DRAWN, TimestepPools, raised
from freq_loss_plugin.training.passes import Pass
from freq_loss_plugin.training.term import FrequencyTerm
from freq_loss_plugin.training.timesteps import Draws, SampleDistributions

COUNT = 4
LEAST = torch.tensor([0, 300, 700, 950])


def uniform(count):
    return torch.randint(0, 1000, (count,))


def logit_normal(count):
    return 1000 * torch.sigmoid(torch.randn(count))


def draws_of(draw, per_sample=None, count=COUNT):
    return Draws(draw(count), draw, (8, 8), per_sample)


@pytest.mark.parametrize("draw", [uniform, logit_normal])
def test_each_sample_has_the_distribution_above_its_least(draw):
    pools = TimestepPools("pool")
    found = torch.stack([pools.above(LEAST, draws_of(draw), f"stream:{n}") for n in range(1500)])
    torch.manual_seed(1)
    own = draw(1_000_000)
    for samples, least in zip(found.unbind(dim=1)[1:], LEAST[1:], strict=True):
        assert samples.min() >= least
        assert stats.ks_2samp(samples, own[own >= least]).pvalue > 1e-3


def test_samples_may_have_distributions_of_their_own():
    ends = [10.0, 400.0, 1000.0, 1000.0]
    least = torch.tensor([0, 300, 0, 900])
    per_sample = SampleDistributions(
        lambda: torch.rand(4) * torch.tensor(ends), torch.ones_like, ends, lambda end, count: torch.rand(count) * end
    )
    pools = TimestepPools("pool")
    found = torch.stack([pools.above(least, draws_of(uniform, per_sample), f"s:{n}") for n in range(400)])
    for sample in (1, 3):
        first, end = float(least[sample]), ends[sample]
        assert stats.kstest(found[:, sample], stats.uniform(first, end - first).cdf).pvalue > 1e-3


def test_a_trainer_is_asked_once_for_each_distribution():
    """Of three sizes two have the same one."""
    asked = []

    def draw(count, shift=0.0):
        asked.append(count)
        return 1000 * torch.sigmoid(torch.randn(count) + shift)

    pools = TimestepPools("pool")
    for number in range(50):
        for size, shift in (((128, 128), 0.0), ((64, 96), 0.0), ((32, 32), 1.0)):
            draws = Draws(torch.zeros(COUNT), functools.partial(draw, shift=shift), size)
            pools.above(torch.tensor([0, 300, 500, 600]), draws, f"{number}")
    assert sum(asked) == 2 * DRAWN + 3 * 16


def test_more_is_drawn_where_little_lies_above():
    rare = Draws(torch.zeros(1), lambda count: 1000 * torch.rand(count) ** 50, (8, 8))
    pools = TimestepPools("pool")
    found = [float(pools.above(torch.tensor([900]), rare, f"{number}")) for number in range(300)]
    assert min(found) >= 900
    assert len(set(found)) > 100


def test_where_there_is_nothing_above_the_least_itself_is_taken():
    nothing = Draws(torch.zeros(2), torch.zeros, (8, 8))
    assert TimestepPools("pool").above(torch.tensor([0, 500]), nothing, "s").tolist() == [0, 500]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_only_what_is_below_is_raised_and_no_other_random_number_changes(dtype):
    timesteps = torch.tensor([5, 400, 10, 999])
    draws = draws_of(uniform)
    state, given = torch.get_rng_state(), LEAST.to(dtype, copy=True)
    above = TimestepPools("pool").above(given, draws, "stream")
    assert torch.equal(given, LEAST.to(dtype))
    assert torch.equal(torch.get_rng_state(), state)
    result = raised(timesteps, LEAST, above)
    assert result.tolist() == [5, 400, above[2].item(), 999]
    assert result.dtype == timesteps.dtype
    assert torch.equal(above, TimestepPools("pool").above(LEAST, draws, "stream"))


def make_term(**options):
    return FrequencyTerm(FreqLossConfig(dist_match=1.0, **options), "flow", seed=0)


def losses(term, timesteps):
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, COUNT, 4, 16, 16, generator=generator)
    passed = Pass(prediction.requires_grad_(), target, timesteps)
    term.join(passed, (prediction - target).square().mean())
    return term.settle(1)


@pytest.mark.parametrize("method", ["wavelet", "fft"])
def test_the_shared_term_is_that_of_the_samples_that_may_train_there(method):
    seen = set()
    for seed in range(20):
        term = FrequencyTerm(FreqLossConfig(dist_match=1.0, timesteps="shared", method=method), "flow", seed=seed)
        assert term.plan(LEAST).chooses
        timesteps = term.choose(draws_of(uniform))
        assert (timesteps >= LEAST).all()
        if not term.has_term:
            continue
        shared = timesteps[0]
        counted = shared >= LEAST
        assert (timesteps[counted] == shared).all()
        found = losses(term, timesteps)
        other = make_term(timesteps="own", method=method, min_timestep=0, max_timestep=1000)
        other.plan()
        generator = torch.Generator().manual_seed(0)
        prediction, target = torch.randn(2, COUNT, 4, 16, 16, generator=generator)
        expected = other.evaluate(Pass(prediction[counted], target[counted], float(shared)))
        assert (found.low, found.high) == pytest.approx((float(expected.low), float(expected.high)), rel=1e-5)
        seen.add(int(counted.sum()))
    assert seen == {1, 2}


def test_with_distributions_of_their_own_both_conditions_hold():
    per_sample = SampleDistributions(
        lambda: uniform(COUNT),
        lambda timesteps: torch.full((COUNT,), 0.5).double(),
        [0] * COUNT,
        lambda _, count: uniform(count),
    )
    has_term = set()
    for seed in range(40):
        term = FrequencyTerm(FreqLossConfig(dist_match=1.0, timesteps="shared"), "flow", seed=seed)
        term.plan(LEAST)
        timesteps = term.choose(draws_of(uniform, per_sample))
        assert (timesteps >= LEAST).all()
        if term.has_term:
            shared, counted = term._plan.shared, term._plan.counted
            assert not counted[shared < LEAST].any()
            assert (timesteps[counted] == shared).all()
        has_term.add(term.has_term)
    assert has_term == {True, False}


def test_without_least_timesteps_what_is_chosen_is_what_it_was():
    chosen = []
    for least in (None, torch.zeros(COUNT)):
        term = make_term(timesteps="shared")
        term.plan(least)
        chosen.append(term.choose(draws_of(uniform)))
    assert torch.equal(*chosen)


def test_an_extra_pass_is_left_out_where_nothing_may_train_there():
    term = make_term()
    assert term.plan(torch.full((COUNT,), 900)).extra is None
    plan = term.plan(torch.tensor([0, 900, 900, 0]))
    assert plan.extra is not None
    assert plan.counted.tolist() == [True, False, False, True]


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
def test_a_resumed_run_picks_what_the_uninterrupted_one_did(prediction_type):
    """Also where an image with a higher least timestep came before."""
    batches = [torch.tensor([950.0, 400.0]), torch.tensor([400.0, 400.0]), torch.tensor([0.0, 400.0])]

    def draw(count):
        return 1000 * torch.randn(count).sigmoid()

    def run(first):
        term = FrequencyTerm(
            FreqLossConfig(dist_match=0.0), prediction_type, seed=1, first_batch=first, least={0: 1, 400: 3, 950: 1}
        )
        chosen = []
        for least in batches[first:]:
            term.plan(least)
            chosen.append(term.choose(Draws(torch.full((2,), 10.0), draw)).tolist())
        return chosen

    assert run(1) == run(0)[1:]
