"""Timesteps drawn again until they are above a least one, and what the frequency term makes of such images."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.training.least_timesteps import draw_above, raised, several_of
from freq_loss_plugin.training.passes import Pass
from freq_loss_plugin.training.term import FrequencyTerm
from freq_loss_plugin.training.timesteps import SampleDistributions

COUNT = 4
LEAST = torch.tensor([0, 300, 700, 950])


def uniform(count):
    return torch.randint(0, 1000, (count,))


def logit_normal(count):
    return 1000 * torch.sigmoid(torch.randn(count))


@pytest.mark.parametrize("draw", [uniform, logit_normal])
def test_each_sample_has_the_distribution_above_its_least(draw):
    found = torch.stack([draw_above(several_of(draw, COUNT), LEAST, f"stream:{n}") for n in range(1500)])
    own = draw(100_000)
    for samples, least in zip(found.unbind(dim=1), LEAST, strict=True):
        assert samples.min() >= least
        assert stats.ks_2samp(samples, own[own >= least]).pvalue > 1e-3


def test_samples_may_have_distributions_of_their_own():
    ends = torch.tensor([10.0, 400.0, 1000.0, 1000.0])
    least = torch.tensor([0, 300, 0, 900])
    found = torch.stack([draw_above(lambda: (torch.rand(4) * ends)[None], least, f"s:{n}") for n in range(400)])
    for samples, first, end in zip(found.unbind(dim=1), least, ends, strict=True):
        assert stats.kstest(samples, stats.uniform(float(first), float(end - first)).cdf).pvalue > 1e-3


def test_where_there_is_nothing_above_the_least_itself_is_taken():
    assert draw_above(several_of(lambda count: torch.zeros(count), 2), torch.tensor([0, 500]), "s").tolist() == [0, 500]


def test_only_what_is_below_is_raised_and_no_other_random_number_changes():
    timesteps = torch.tensor([5, 400, 10, 999])
    state = torch.get_rng_state()
    above = draw_above(several_of(uniform, COUNT), LEAST, "stream")
    assert torch.equal(torch.get_rng_state(), state)
    result = raised(timesteps, LEAST, above)
    assert result.tolist() == [5, 400, above[2].item(), 999]
    assert result.dtype == timesteps.dtype
    assert torch.equal(above, draw_above(several_of(uniform, COUNT), LEAST, "stream"))


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
        plan = term.plan(COUNT, uniform, least=LEAST)
        assert (plan.timesteps >= LEAST).all()
        if plan.shared is None:
            continue
        counted = plan.shared >= LEAST
        assert torch.equal(plan.counted, counted)
        assert (plan.timesteps[counted] == plan.shared).all()
        found = losses(term, plan.timesteps)
        other = make_term(timesteps="own", method=method, min_timestep=0, max_timestep=1000)
        other.plan(COUNT)
        generator = torch.Generator().manual_seed(0)
        prediction, target = torch.randn(2, COUNT, 4, 16, 16, generator=generator)
        expected = other.evaluate(Pass(prediction[counted], target[counted], plan.shared))
        assert (found.low, found.high) == pytest.approx((float(expected.low), float(expected.high)), rel=1e-5)
        seen.add(int(counted.sum()))
    assert seen == {1, 2}


def test_with_distributions_of_their_own_both_conditions_hold():
    per_sample = SampleDistributions(lambda: uniform(COUNT), lambda timesteps: torch.full((COUNT,), 0.5).double())
    for seed in range(12):
        term = FrequencyTerm(FreqLossConfig(dist_match=1.0, timesteps="shared"), "flow", seed=seed)
        plan = term.plan(COUNT, uniform, per_sample, least=LEAST)
        assert (plan.timesteps >= LEAST).all()
        if plan.shared is not None:
            assert not plan.counted[plan.shared < LEAST].any()
            assert (plan.timesteps[plan.counted] == plan.shared).all()


def test_without_least_timesteps_a_plan_is_what_it_was():
    plans = [make_term(timesteps="shared").plan(COUNT, uniform, least=least) for least in (None, torch.zeros(COUNT))]
    assert torch.equal(plans[0].timesteps, plans[1].timesteps)
    assert plans[0].shared == plans[1].shared


def test_an_extra_pass_is_left_out_where_nothing_may_train_there():
    term = make_term()
    assert term.plan(COUNT, least=torch.full((COUNT,), 900)).extra is None
    plan = term.plan(COUNT, least=torch.tensor([0, 900, 900, 0]))
    assert plan.extra is not None
    assert plan.counted.tolist() == [True, False, False, True]
