"""Base loss and term at the model's output: the ratio that is held, the cosine, and what half precision would lose."""

from __future__ import annotations

import forks
import numpy as np
import pytest
import torch
import torch.distributed as dist

from freq_loss_plugin import ConfigError, FreqLossConfig, frequency_matching_loss
from freq_loss_plugin.training.gradient_balance import (
    BOUNDS,
    GradientBalance,
    GradientRatio,
    base_gradient,
    detached_term,
    with_gradient,
)

HOST = torch.device("cpu")


def of_norm(norm, size=7):
    return torch.full((size,), norm / size**0.5)


def expected_gain(ratio, base, term, decay=0.95):
    """The definition, with weights written out: the newest counts 1, each one before it ``decay`` of that."""

    def mean_square(norms):
        usable = [norm for norm in norms if norm > 0 and np.isfinite(norm)]
        weights = decay ** np.arange(len(usable))[::-1]
        return np.average(np.square(usable), weights=weights)

    return ratio * (mean_square(base) / mean_square(term)) ** 0.5


def test_the_gain_is_the_definition_over_many_batches():
    random = np.random.default_rng(0)
    base, term = random.uniform(0.5, 2, 60), random.uniform(0.001, 0.1, 60)
    term[[3, 10]], term[20] = 0.0, np.nan  # a batch without a term, and a broken one
    ratio = GradientRatio(0.1)
    for index in range(60):
        ratio.observe(HOST, base=of_norm(base[index]), term=of_norm(term[index]))
        gain = ratio.gain(HOST).item()
        assert gain == pytest.approx(expected_gain(0.1, base[: index + 1], term[: index + 1]), rel=1e-4)


def test_nothing_is_scaled_before_both_are_known():
    ratio = GradientRatio(0.1)
    assert ratio.gain(HOST) == 1
    ratio.observe(HOST, term=of_norm(3.0))
    assert ratio.gain(HOST) == 1
    ratio.observe(HOST, base=of_norm(6.0))
    assert ratio.gain(HOST).item() == pytest.approx(0.2)


@pytest.mark.parametrize(("base", "term", "bound"), [(1e-9, 1.0, BOUNDS[0]), (1.0, 1e-12, BOUNDS[1])])
def test_the_gain_is_bounded(base, term, bound):
    ratio = GradientRatio(0.1)
    ratio.observe(HOST, base=of_norm(base), term=of_norm(term))
    assert ratio.gain(HOST).item() == pytest.approx(bound)


def test_the_averages_continue_from_what_they_saved():
    first, second = GradientRatio(0.2), GradientRatio(0.2)
    assert first.state_dict() == {}
    first.observe(HOST, base=of_norm(1.0), term=of_norm(2.0))
    second.load_state_dict(first.state_dict())
    for ratio in (first, second):
        ratio.observe(HOST, base=of_norm(3.0), term=of_norm(1.0))
    assert first.gain(HOST) == second.gain(HOST)


def term_of(target, **options):
    config = FreqLossConfig(**options)

    def term(prediction):
        return frequency_matching_loss(prediction, target, prediction_type="flow", timesteps=400, config=config)

    return config, term


@pytest.mark.parametrize("dist_match", [1e-4, 7.0])
def test_the_gradient_has_the_ratio_to_the_base_gradient_whatever_dist_match_is(dist_match):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 1, 1, generator=generator).requires_grad_()
    inputs, target = torch.randn(2, 3, 4, 16, 16, generator=generator)
    config, term = term_of(target, dist_match=dist_match, gradient_ratio=0.1, grad_cosine=True)
    prediction = inputs * weight
    base = (prediction - target).square().mean()
    g_b = base_gradient(base, prediction)
    torch.testing.assert_close(g_b, (2 * (prediction - target) / prediction.numel()).detach())
    loss, logs = GradientBalance(config).weigh(prediction, detached_term(prediction, term), g_b, same_pass=True)
    (g,) = torch.autograd.grad(loss.total, prediction, retain_graph=True)
    assert (g.norm() / g_b.norm()).item() == pytest.approx(0.1, rel=1e-5)
    # Only scaled: into the same direction as the term's own gradient, and so is its value.
    (own,) = torch.autograd.grad(term(prediction).total, prediction, retain_graph=True)
    gain = 0.1 * g_b.norm() / own.norm()
    torch.testing.assert_close(g, gain * own, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(loss.total, gain * term(prediction).total.detach(), rtol=1e-4, atol=0)
    assert logs["freq_weight"].item() == pytest.approx(gain.item() * dist_match, rel=1e-5)
    cosine = (own * g_b).sum() / own.norm() / g_b.norm()
    assert logs["freq_grad_cosine"].item() == pytest.approx(cosine.item(), rel=1e-4)
    # The whole still reaches the weight, base loss and all.
    (whole,) = torch.autograd.grad(base + loss.total, weight, retain_graph=True)
    expected = torch.autograd.grad(prediction, weight, g_b + gain * own)[0]
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-8)


def test_without_a_ratio_the_term_is_left_as_it_is():
    inputs, target = torch.randn(2, 3, 4, 16, 16)
    config, term = term_of(target, dist_match=0.5, grad_cosine=True)
    prediction = inputs.requires_grad_()
    loss, logs = GradientBalance(config).weigh(
        prediction, detached_term(prediction, term), inputs - target, same_pass=False
    )
    expected = term(prediction)
    assert logs.keys() == {"freq_grad_cosine"}
    assert loss.total == expected.total
    found = torch.autograd.grad(loss.total, prediction)
    torch.testing.assert_close(found, torch.autograd.grad(expected.total, prediction))


def test_half_precision_loses_nothing_that_a_gradient_scaler_would_keep():
    """Gradients of a mean over 10^6 elements are below float16's smallest number before they are scaled."""
    prediction, target = torch.randn(2, 4, 16, 128, 128).half()
    prediction.requires_grad_()
    exact = prediction.detach().float().requires_grad_()
    base = (prediction.float() - target.float()).square().mean() * 1e-2
    expected = 1e-2 * 2 * (exact.detach() - target.float()) / exact.numel()
    assert (torch.autograd.grad(base, prediction, retain_graph=True)[0] == 0).float().mean() > 0.5
    torch.testing.assert_close(base_gradient(base, prediction), expected, rtol=2e-3, atol=1e-12)
    _, term = term_of(target, dist_match=1e-3)
    detached = detached_term(prediction, term)
    assert detached.gradient.dtype == torch.float32
    scaled = 2.0**16 * with_gradient(prediction, detached.loss.total, detached.gradient)
    (found,) = torch.autograd.grad(scaled, prediction)
    torch.testing.assert_close(found.float(), 2.0**16 * detached.gradient, rtol=2e-3, atol=1e-6)


def test_a_loss_that_was_not_computed_from_the_prediction_is_noticed():
    prediction, other = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="does not compute its loss from the prediction"):
        base_gradient((other * 2).sum(), prediction * 1)


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ratio = GradientRatio(0.1)
    ratio.observe(HOST, base=of_norm((1.0, 7.0)[rank]), term=of_norm((4.0, 3.0)[rank]))
    torch.save(ratio.gain(HOST), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_processes_agree_on_the_gain(tmp_path):
    forks.spawn(work, (str(tmp_path),), 2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert first == second
    assert first.item() == pytest.approx(0.1 * (25 / 12.5) ** 0.5)


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_impossible_ratios_are_refused(value):
    with pytest.raises(ConfigError, match="freq_loss_gradient_ratio"):
        FreqLossConfig(gradient_ratio=value)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, False),
        ({"gradient_ratio": 0.1}, True),
        ({"grad_cosine": True}, True),
        ({"gradient_ratio": 0.1, "dist_match": 0.0}, False),
    ],
)
def test_gradients_are_compared_only_where_asked_for(options, wanted):
    assert GradientBalance.is_wanted(FreqLossConfig(**options)) is wanted
