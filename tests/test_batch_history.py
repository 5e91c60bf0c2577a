"""The batch history: what joins, what is differentiated, and what is kept."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from freq_loss_plugin import ConfigError, FreqLossConfig, frequency_matching_loss
from freq_loss_plugin.training.batch_history import BatchHistory


def batches(count, shape=(2, 4, 16, 16), seed=0):
    return torch.randn(count, 2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(prediction, target, config, history):
    return frequency_matching_loss(
        prediction,
        target,
        prediction_type="sample",
        timesteps=None,
        config=config,
        combine=history.join if history else None,
    )


@pytest.mark.parametrize("method", ["wavelet", "fft"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_definition(method, reduction):
    """L_b and its gradient in the current batch, by the oracle's bands of the weighted sum."""
    config = FreqLossConfig(
        method=method,
        reduction=reduction,
        dist_match=1.0,
        batch_history=2,
        history_decay=0.5,
        low_weight=1.0,
        high_weight=0.0,
    )
    history = BatchHistory(config)
    data = batches(4)
    split = oracle.fft_bands if method == "fft" else oracle.wavelet_bands
    for number, (prediction, target) in enumerate(data):
        prediction.requires_grad_()
        loss = loss_of(prediction, target, config, history)
        loss.total.backward()
        parts = [
            (p - t).sum(0) if reduction == "sum" else (p - t).mean(0) for p, t in data[max(0, number - 2) : number + 1]
        ]
        weights = [0.5**age for age in reversed(range(len(parts)))]
        joined = sum(weight * part.detach() for weight, part in zip(weights, parts, strict=True))
        scale = 1 / 2 if reduction == "mean" else 1.0
        if reduction == "mean":
            joined, scale = joined / sum(weights), scale / sum(weights)
        low, high = (torch.from_numpy(band) for band in split(joined.numpy()[None]))
        assert loss.low.item() == pytest.approx(low.square().mean().item(), rel=1e-6)
        assert loss.high.item() == pytest.approx(high.square().mean().item(), rel=1e-6)
        # A step along the gradient: the derivative of L_low, whose only variable is this batch.
        direction = torch.randn_like(prediction)
        moved = (torch.from_numpy(split(direction.sum(0).numpy()[None])[0]) * low).mean() * 2 * scale
        assert (prediction.grad * direction).sum().item() == pytest.approx(moved.item(), rel=1e-6)


def test_only_batches_of_the_same_size_join():
    config = FreqLossConfig(dist_match=1.0, batch_history=3)
    history = BatchHistory(config)
    for prediction, target in batches(2, (2, 4, 16, 24)):
        loss_of(prediction, target, config, history)
    ((prediction, target),) = batches(1)
    alone = loss_of(prediction, target, config, None)
    torch.testing.assert_close(loss_of(prediction, target, config, history), alone)


def test_a_residual_that_alternates_is_left_alone_and_one_that_persists_is_not():
    config = FreqLossConfig(dist_match=1.0, batch_history=1)
    ((prediction, target),) = batches(1)
    once = loss_of(prediction, target, config, None).total
    for second, expected in ((prediction, 4 * once), (2 * target - prediction, 0 * once)):
        history = BatchHistory(config)
        loss_of(prediction, target, config, history)
        torch.testing.assert_close(loss_of(second, target, config, history).total, expected)


@pytest.mark.parametrize("kept", [1, 3])
def test_it_continues_from_what_it_saved(kept):
    config = FreqLossConfig(dist_match=1.0, batch_history=3, history_decay=0.9)
    history, restored = BatchHistory(config), BatchHistory(FreqLossConfig(batch_history=kept, history_decay=0.9))
    *past, last = batches(5)
    for pair in (*past, *batches(2, (1, 4, 8, 8))):
        loss_of(*pair, config, history)
    restored.load_state_dict(history.state_dict())
    if kept == 3:
        expected = loss_of(*last, config, history)
    else:
        history = BatchHistory(FreqLossConfig(batch_history=1, history_decay=0.9))
        loss_of(*past[-1], config, history)
        expected = loss_of(*last, config, history)
    torch.testing.assert_close(loss_of(*last, config, restored), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_history": -1}, "freq_loss_batch_history = -1.*>= 0"),
        ({"history_decay": 0.0}, "freq_loss_history_decay = 0.0.*above 0"),
        ({"history_decay": 1.5}, "freq_loss_history_decay = 1.5.*at most 1"),
        ({"history_decay": np.nan}, "freq_loss_history_decay = nan"),
    ],
)
def test_impossible_values_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        FreqLossConfig(**options)
