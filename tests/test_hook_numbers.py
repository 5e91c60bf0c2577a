"""What the hook compares and logs on every trainer class of sd-scripts: gradients, half precision, validation."""

from __future__ import annotations

import argparse
import functools
import logging

import numpy as np
import pytest
import torch
from hooked import NAMES, expected_bands, install
from torch import autocast

from freq_loss_plugin import ConfigError, FreqLossConfig
from freq_loss_plugin.training.monitor import DeferredScalars
from freq_loss_plugin.training.passes import Pass
from freq_loss_plugin.training.term import FrequencyTerm
from kohya_patch.state import FILE, StateFile

# The host's own warnings are none of this project's business.
pytestmark = pytest.mark.filterwarnings("default")


def keep_gradients(stand_in):
    """The predictions of all passes from now on, whose gradients a backward pass leaves behind."""
    original, kept = stand_in.trainer.get_noise_pred_and_target, []

    @functools.wraps(original)
    def keep(*positional, **named):
        results = original(*positional, **named)
        results[0].retain_grad()
        kept.append(results[0])
        return results

    stand_in.trainer.get_noise_pred_and_target = keep
    return kept


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_ratio_is_held_in_the_same_pass(stand_ins, name):
    gradients = {}
    for ratio in (None, 0.25):
        stand_in = stand_ins.make(name)
        kept = keep_gradients(stand_in)
        dist_match = 0.0 if ratio is None else 0.003
        config = FreqLossConfig(dist_match=dist_match, timesteps="own", max_timestep=1000, gradient_ratio=ratio or 0.0)
        hook = install(stand_in, config)
        loss = stand_in.process_batch()
        kept[0].grad = None  # looking at the base loss's gradient leaves it here, too
        loss.backward()
        gradients[ratio] = kept[0].grad
    base, term = gradients[None], gradients[0.25] - gradients[None]
    assert (term.norm() / base.norm()).item() == pytest.approx(0.25, rel=1e-3)
    numbers = hook.term.settle(1)
    weight = numbers.others["freq_weight"]
    assert numbers.total == pytest.approx(weight * (0.7 * numbers.low + 0.3 * numbers.high), rel=1e-4)
    assert loss.item() == pytest.approx(numbers.base + numbers.total, rel=1e-5)


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_ratio_is_held_by_the_extra_pass(stand_ins, name):
    """The averages are computed again; at first plain MSE in the extra pass stands for the base loss."""
    stand_in = stand_ins.make(name)
    kept = keep_gradients(stand_in)
    hook = install(stand_in, FreqLossConfig(dist_match=0.003, gradient_ratio=0.25, grad_cosine=True))
    bases, terms = [], []
    for _ in range(4):
        kept.clear()
        loss = stand_in.process_batch()
        kept[1].grad = None
        loss.backward()
        extra, base = (prediction.grad for prediction in kept)
        numbers = hook.term.settle(1)
        gain = numbers.others["freq_weight"] / 0.003
        terms.append(extra.norm().item() / gain)
        prediction, target = stand_in.passes[0][:2]
        plain_mse = 2 * (prediction - target).norm().item() / prediction.numel()
        squares = [np.square(norms) for norms in (bases or [plain_mse], terms)]
        means = [np.average(values, weights=0.95 ** np.arange(len(values))[::-1]) for values in squares]
        assert gain == pytest.approx(0.25 * (means[0] / means[1]) ** 0.5, rel=1e-3)
        bases.append(base.norm().item())
        cosine = torch.nn.functional.cosine_similarity(extra.flatten(), (prediction - target).flatten(), dim=0)
        assert numbers.others["freq_grad_cosine"] == pytest.approx(cosine.item(), abs=1e-4)
        assert numbers.logs()["loss/freq_grad_cosine"] == numbers.others["freq_grad_cosine"]


@pytest.mark.sd_scripts
def test_a_batch_without_a_shared_timestep_has_no_weight_and_no_cosine(stand_ins):
    stand_in = stand_ins.make("sd15")
    hook = install(stand_in, FreqLossConfig(timesteps="shared", gradient_ratio=0.1, grad_cosine=True))
    seen = set()
    for _ in range(12):
        loss = stand_in.process_batch()
        numbers = hook.term.settle(1)
        assert bool(numbers.others) == (numbers.total > 0)
        assert loss.item() == pytest.approx(numbers.base + numbers.total, rel=1e-5)
        seen.add(numbers.total > 0)
    assert seen == {True, False}


@pytest.mark.sd_scripts
@pytest.mark.parametrize(
    "options",
    [
        {"dist_match": 0.1},
        {"gradient_ratio": 0.5},
        {"gradient_ratio": 0.5, "timesteps": "own", "max_timestep": 1000},
    ],
    ids=["unified", "unified ratio", "own ratio"],
)
def test_float16_autocast_with_a_gradient_scaler(stand_ins, options):
    """What a GPU does under fp16: the scaled gradient, unscaled, is the float32 gradient up to half precision."""
    gradients, predictions = {}, {}
    for half in (False, True):
        stand_in = stand_ins.make("sd15")
        scaler = torch.amp.GradScaler("cpu", enabled=half, init_scale=2.0**10)
        stand_in.accelerator.autocast = lambda: autocast("cpu", dtype=torch.float16, enabled=half)  # noqa: B023
        install(stand_in, FreqLossConfig(**options))
        stand_in.accelerator.scaler = scaler
        optimizer = torch.optim.SGD(stand_in.denoiser.parameters(), lr=0.0)
        stand_in.accelerator.backward(stand_in.process_batch())
        if half:
            scaler.unscale_(optimizer)
        predictions[half] = stand_in.passes[0][0]
        gradients[half] = stand_in.denoiser.mix.grad.clone()
    error = (gradients[True] - gradients[False]).norm() / gradients[False].norm()
    assert error < 5e-3
    assert not torch.equal(predictions[True], predictions[False])


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_validation_in_bands_goes_to_the_trainers_own_trackers(stand_ins, name, tmp_path):
    from accelerate import Accelerator
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stand_in = stand_ins.make(name)
    stand_in.accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    stand_in.accelerator.init_trackers("run")
    untouched = stand_in.process_batch(is_train=False)
    install(stand_in, FreqLossConfig(validation=True, min_timestep=0, max_timestep=1000))
    energies = []
    for seed in (3, 4):
        found = stand_in.process_batch(is_train=False, seed=seed)
        assert seed != 3 or torch.equal(found, untouched)
        stand_in.batch["loss_weights"] = torch.ones(3)
        energies.append(expected_bands(stand_in, stand_in.passes[0]))
    logs = {"loss/validation/step_average": 0.5}
    stand_in.trainer.accelerator_logging(stand_in.accelerator, {"lr/unet": 1.0}, 7, 7, 1)
    stand_in.trainer.accelerator_logging(stand_in.accelerator, logs, 7, 7, 1)
    stand_in.accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert "lr/unet" in scalars
    assert [event.step for event in scalars["loss/validation/freq_low"]] == [7]
    for band, expected in zip(("low", "high"), np.mean(energies, axis=0), strict=True):
        tolerance = 0.02 if name == "hunyuan_image" else 1e-3
        assert scalars[f"loss/validation/freq_{band}"][0].value == pytest.approx(expected, rel=tolerance)
    assert {"loss/validation/freq_spectrum_low", "loss/validation/freq_spectrum_high"} <= scalars.keys()
    (image,) = events.Images("loss/validation/freq_spectrum")
    assert (image.width, image.height) == (900, 560)


def test_deferred_scalars_are_the_scalars():
    assert DeferredScalars(torch.tensor(1.5), torch.tensor(2.5, dtype=torch.bfloat16)).read() == [1.5, 2.5]


def test_a_state_without_our_file_begins_anew_with_a_warning(tmp_path, caplog):
    pytest.importorskip("accelerate")
    config = FreqLossConfig(timesteps="own", max_timestep=1000, balance="band", gradient_ratio=0.1)
    args = argparse.Namespace(resume=str(tmp_path))
    term = FrequencyTerm(config, "flow", seed=1)
    with caplog.at_level(logging.WARNING, logger="kohya_patch"):
        state = StateFile(args, term)
    assert "freq_loss_balance begins anew" in caplog.text
    assert "freq_loss_gradient_ratio begins anew" in caplog.text
    prediction = torch.randn(3, 4, 8, 8, requires_grad=True)
    term.plan()
    term.join(Pass(prediction, torch.zeros(3, 4, 8, 8), 500.0), prediction.square().mean())
    state._save(None, None, str(tmp_path))
    caplog.clear()
    resumed = FrequencyTerm(config, "flow", seed=1)
    StateFile(args, resumed)
    assert caplog.text == ""
    before, after = term.state_dict(), resumed.state_dict()
    assert before.keys() == after.keys()
    assert {name.partition(".")[0] for name in before} == {"balance", "gradient_ratio"}
    for name, value in before.items():
        assert torch.equal(after[name], value)
    (tmp_path / FILE).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=f"{FILE} is damaged .*; remove it"):
        StateFile(args, FrequencyTerm(config, "flow", seed=1))
