"""Every trainer class of sd-scripts, its real `process_batch` and all, with a stand-in for the denoiser.

And what the hook checks before and while it works: combinations that cannot work, trainers it does not know, and terms
that are not finite.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import logging
import random
import subprocess
import sys
import weakref
from pathlib import Path

import hosts
import numpy as np
import oracle
import pytest
import torch
from torch import autocast

import freq_loss_plugin.report
import kohya_patch
from freq_loss_plugin import ConfigError, FreqLossConfig
from freq_loss_plugin.balance import Balance
from freq_loss_plugin.memory import ResidualMemory
from freq_loss_plugin.report import ShareReport
from freq_loss_plugin.step import DeferredScalars, NonFiniteLossError, shared_timesteps
from kohya_patch import host, network, report
from kohya_patch.hook import LossHook
from kohya_patch.host import UnsupportedTrainerError
from kohya_patch.state import StateFile
from kohya_patch.timesteps import at_one_timestep, choosing_timesteps
from kohya_patch.trainers import FAMILIES, Training, find_training, first_step

HOST_FOLDER = Path(__file__).parent / "sd_scripts_host"
NAMES = ["sd15", "sdxl", "sd3", "flux", "lumina", "hunyuan_image", "anima"]
PREDICTION = {"sd15": "epsilon", "sdxl": "epsilon", "sd3": "sample"}
ALPHAS = oracle.stable_diffusion_alphas_cumprod()

# The host's own warnings are none of this project's business.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def stand_ins():
    path = hosts.sd_scripts()
    sys.path[:0] = [str(path), str(HOST_FOLDER)]
    level = logging.getLogger().level
    import stand_ins

    yield stand_ins
    for entry in (str(path), str(HOST_FOLDER)):
        sys.path.remove(entry)
    logging.getLogger().setLevel(level)


def install(stand_in, config):
    hook = LossHook(Training(stand_in.trainer, stand_in.args), config, "networks.lora")
    hook.install()
    return hook


def expected_bands(stand_in, used, *, window=None, mask=None):
    """(L_low, L_high) of a recorded pass by the oracle."""
    name = Training(stand_in.trainer, stand_in.args).family.name
    prediction, target, timesteps = used
    scale = 1000 if name == "Anima" else 1
    timesteps = [float(t) * scale for t in timesteps]
    prediction_type = {"SD3": "sample", "SD1.x / SD2.x": "epsilon", "SDXL": "epsilon"}.get(name, "flow")
    weights = stand_in.batch["loss_weights"].numpy()
    if window:
        weights = weights * [window[0] <= t < window[1] for t in timesteps]
    return oracle.loss(
        prediction.double().numpy(),
        target.double().numpy(),
        np.zeros(prediction.shape),
        prediction_type=prediction_type,
        timesteps=timesteps,
        alphas_cumprod=ALPHAS,
        weights=weights,
        bands=oracle.wavelet_bands,
        mask=mask,
    )


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_unified_adds_the_formula_of_an_extra_pass_at_one_timestep(stand_ins, name):
    stand_in = stand_ins.make(name)
    base = stand_in.process_batch()
    base_pass = stand_in.passes[0]
    next_draw, python_state = torch.rand(3), random.getstate()
    config = FreqLossConfig(dist_match=0.1)
    install(stand_in, config)
    for _ in range(3):
        loss = stand_in.process_batch()
        assert torch.equal(torch.rand(3), next_draw)
        assert random.getstate() == python_state
        extra, first = stand_in.passes
        for seen, untouched in zip(first, base_pass, strict=True):
            assert torch.equal(seen, untouched)
        timesteps = extra[2].float() * (1000 if name == "anima" else 1)
        assert timesteps.max() - timesteps.min() < 1e-3
        assert 200 <= timesteps[0].round() < 600
        # Hunyuan reports s·1000 cut to a whole number, which can be one below the timestep that was used.
        low, high = expected_bands(stand_in, extra)
        tolerance = 0.02 if name == "hunyuan_image" else 1e-5
        assert (loss - base).item() == pytest.approx(0.1 * (0.7 * low + 0.3 * high), rel=tolerance)
    (gradient,) = torch.autograd.grad(loss, stand_in.denoiser.mix)
    assert gradient.isfinite().all()


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_own_adds_the_formula_of_the_base_pass(stand_ins, name):
    stand_in = stand_ins.make(name)
    stand_in.batch["loss_weights"] = torch.tensor([1.0, 0.5, 1.0])
    base = stand_in.process_batch()
    window = (50, 950)
    config = FreqLossConfig(dist_match=0.1, timesteps="own", min_timestep=window[0], max_timestep=window[1])
    install(stand_in, config)
    stand_in.denoiser.calls = 0
    loss = stand_in.process_batch()
    assert stand_in.denoiser.calls == len(stand_in.passes) == 1
    low, high = expected_bands(stand_in, stand_in.passes[0], window=window)
    assert low > 0
    assert (loss - base).item() == pytest.approx(0.1 * (0.7 * low + 0.3 * high), rel=1e-4)


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_two_backward_passes_add_up_to_the_gradient_of_the_sum(stand_ins, name, monkeypatch):
    """The unified pass is propagated first; under DeepSpeed, where it cannot be, both together and with a reason."""
    found, told = {}, []
    monkeypatch.setattr(report.logger, "log", lambda level, *words: told.append(words[-1]))
    for kind in ("NO", "DEEPSPEED"):
        stand_in = stand_ins.make(name, gradient_accumulation_steps=2)
        stand_in.accelerator.gradient_accumulation_steps = 2
        hook = install(stand_in, FreqLossConfig(dist_match=5.0))
        monkeypatch.setattr(hook, "_propagates_at_once", functools.partial(asked, hook._propagates_at_once, kind))
        for _ in range(2):
            loss = stand_in.process_batch()
            (left,) = torch.autograd.grad(loss, stand_in.denoiser.mix, retain_graph=True)
            stand_in.accelerator.backward(loss)
        found[kind] = loss.item(), stand_in.denoiser.mix.grad, left
    assert found["NO"][0] == found["DEEPSPEED"][0]
    torch.testing.assert_close(found["NO"][1], found["DEEPSPEED"][1], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found["NO"][2], found["DEEPSPEED"][2], rtol=1e-3)
    assert [words for words in told if "under DeepSpeed" in words] == [report.TWO_GRAPHS.text]


def asked(propagates_at_once, kind, accelerator):
    from accelerate.utils import DistributedType

    return propagates_at_once(argparse.Namespace(distributed_type=DistributedType[kind]))


@pytest.mark.sd_scripts
def test_a_trained_text_encoder_is_part_of_both_passes(stand_ins):
    """Its graph is there once and is propagated twice."""
    gradients = {}
    for together in (False, True):
        stand_in = stand_ins.make("sd15")
        words = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        call_unet = stand_in.trainer.call_unet

        def reads_the_text(args, accelerator, unet, noisy, timesteps, conds, *rest, **named):
            predicted = call_unet(args, accelerator, unet, noisy, timesteps, conds, *rest, **named)  # noqa: B023
            return predicted + conds[0].mean(dim=(1, 2)).view(-1, 1, 1, 1)

        stand_in.trainer.call_unet = reads_the_text
        stand_in.batch["text_encoder_outputs_list"] = [words.sin()]
        hook = install(stand_in, FreqLossConfig(dist_match=5.0))
        if together:
            hook._propagates_at_once = lambda _: False
        stand_in.accelerator.backward(stand_in.process_batch())
        gradients[together] = words.grad
    assert gradients[False].abs().sum() > 0
    torch.testing.assert_close(gradients[False], gradients[True])


class SavedBytes:
    """How much autograd keeps for backward passes, now and at most."""

    def __init__(self):
        self.now = self.most = 0

    def pack(self, tensor):
        kept = _Kept(tensor)
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(kept, self._drop, size)
        return kept

    def _drop(self, size):
        self.now -= size


class _Kept:
    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.sd_scripts
def test_unified_keeps_no_more_for_backward_passes_than_plain_training(stand_ins):
    most = {}
    for dist_match, together in ((0.0, False), (0.1, False), (0.1, True)):
        stand_in = stand_ins.make("sd15")
        layer, depth = stand_in.denoiser.forward, 40

        def deep(x, *others, **named):
            sample = layer(x, *others, **named)  # noqa: B023
            for _ in range(depth):  # noqa: B023
                sample = type(sample)(layer(sample.sample.tanh()).sample)  # noqa: B023
            return sample

        stand_in.denoiser.forward = deep
        hook = install(stand_in, FreqLossConfig(dist_match=dist_match))
        if together:
            hook._propagates_at_once = lambda _: False
        kept = SavedBytes()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda kept: kept.tensor):
            stand_in.accelerator.backward(stand_in.process_batch())
        most[dist_match, together] = kept.most
    assert most[0.1, False] <= 1.05 * most[0.0, False]
    assert most[0.1, True] > 1.9 * most[0.0, False]  # so it can be seen


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
        (numbers,) = hook._monitor.settle(1)
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


def kolmogorov_smirnov(a, b):
    """The distance of two samples' distributions, in units in which 1.95 is exceeded by chance once in a thousand."""
    both = np.sort(np.concatenate([a, b]))
    cumulated = (np.searchsorted(np.sort(each), both, side="right") / len(each) for each in (a, b))
    distance = np.abs(np.subtract(*cumulated)).max()
    return distance * (len(a) * len(b) / (len(a) + len(b))) ** 0.5


def drawing_of(stand_in):
    """How the trainer draws n timesteps for a batch like its own."""
    draws = []

    def choose(draw, count, own):
        draws.append(draw)
        return draw(count)

    trainer = type(stand_in.trainer)
    prediction = FAMILIES[trainer.__name__].prediction
    with choosing_timesteps(prediction, host.drawing_function(trainer, prediction), choose):
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
        assert kolmogorov_smirnov(torch.stack(found)[:, place].numpy(), expected.float().numpy()) < 1.95  # 0.1%
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
    """2,000 batches of the trainer alone, and 2,000 with the hook: each sample's timesteps are distributed alike."""
    scale = 1000 if name == "anima" else 1
    found = {}
    for is_hooked in (False, True):
        stand_in = with_offsets(stand_ins, name, **arguments)
        if is_hooked:
            install(stand_in, FreqLossConfig(dist_match=0.1, timesteps="shared"))
        together, drawn = [], []
        for seed in range(2000):
            stand_in.process_batch(seed=seed)
            timesteps = stand_in.passes[0][2].float() * scale
            drawn.append(timesteps)
            if is_hooked:
                together.append(((timesteps - timesteps[2]).abs() < 1e-3)[:2].float())
        found[is_hooked] = torch.stack(drawn).numpy()
    for place in range(3):
        assert kolmogorov_smirnov(found[False][:, place], found[True][:, place]) < 1.95  # 0.1%
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
        (numbers,) = hook._monitor.settle(1)
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
def test_a_share_of_the_base_gradient_is_held_in_the_same_pass(stand_ins, name):
    gradients = {}
    for share in (None, 0.25):
        stand_in = stand_ins.make(name)
        kept = keep_gradients(stand_in)
        dist_match = 0.0 if share is None else 0.003
        config = FreqLossConfig(dist_match=dist_match, timesteps="own", max_timestep=1000, share=share or 0.0)
        hook = install(stand_in, config)
        loss = stand_in.process_batch()
        kept[0].grad = None  # looking at the base loss's gradient leaves it here, too
        loss.backward()
        gradients[share] = kept[0].grad
    base, term = gradients[None], gradients[0.25] - gradients[None]
    assert (term.norm() / base.norm()).item() == pytest.approx(0.25, rel=1e-3)
    (numbers,) = hook._monitor.settle(1)
    weight = numbers.others["weight"]
    assert numbers.total == pytest.approx(weight * (0.7 * numbers.low + 0.3 * numbers.high), rel=1e-4)
    assert loss.item() == pytest.approx(numbers.base + numbers.total, rel=1e-5)


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_a_share_of_the_base_gradient_is_held_by_the_extra_pass(stand_ins, name):
    """Its weight is dist_match in the first batch; afterwards it follows from the averages, which are redone here."""
    stand_in = stand_ins.make(name)
    kept = keep_gradients(stand_in)
    hook = install(stand_in, FreqLossConfig(dist_match=0.003, share=0.25, grad_cosine=True))
    bases, terms = [], []
    for _ in range(4):
        kept.clear()
        loss = stand_in.process_batch()
        kept[1].grad = None
        loss.backward()
        extra, base = (each.grad for each in kept)
        (numbers,) = hook._monitor.settle(1)
        gain = numbers.others["weight"] / 0.003
        terms.append(extra.norm().item() / gain)
        if bases:
            means = [np.average(np.square(x), weights=0.95 ** np.arange(len(x))[::-1]) for x in (bases, terms)]
            assert gain == pytest.approx(0.25 * (means[0] / means[1]) ** 0.5, rel=1e-3)
        else:
            assert gain == pytest.approx(1)
        bases.append(base.norm().item())
        prediction, target = stand_in.passes[0][:2]
        cosine = torch.nn.functional.cosine_similarity(extra.flatten(), (prediction - target).flatten(), dim=0)
        assert numbers.others["grad_cosine"] == pytest.approx(cosine.item(), abs=1e-4)
        assert numbers.logs()["loss/freq_grad_cosine"] == numbers.others["grad_cosine"]


@pytest.mark.sd_scripts
def test_a_batch_without_a_shared_timestep_has_no_weight_and_no_cosine(stand_ins):
    stand_in = stand_ins.make("sd15")
    hook = install(stand_in, FreqLossConfig(timesteps="shared", share=0.1, grad_cosine=True))
    seen = set()
    for _ in range(12):
        loss = stand_in.process_batch()
        (numbers,) = hook._monitor.settle(1)
        assert bool(numbers.others) == (numbers.total > 0)
        assert loss.item() == pytest.approx(numbers.base + numbers.total, rel=1e-5)
        seen.add(numbers.total > 0)
    assert seen == {True, False}


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_validation_is_told_in_bands_to_the_trainers_own_trackers(stand_ins, name, tmp_path):
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
    (picture,) = events.Images("loss/validation/freq_spectrum")
    assert (picture.width, picture.height) == (900, 560)


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_validation_and_other_trainings_are_left_alone(stand_ins, name):
    stand_in = stand_ins.make(name)
    base = stand_in.process_batch(is_train=False)
    install(stand_in, FreqLossConfig(dist_match=0.1))
    assert torch.equal(stand_in.process_batch(is_train=False), base)
    stand_in.args = argparse.Namespace(**vars(stand_in.args))  # the same trainer object, a training of its own
    assert torch.equal(stand_in.process_batch(), base)


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", ["flux", "lumina", "hunyuan_image"])
@pytest.mark.parametrize("shape", ["additive", "sigma_scaled"])
def test_unified_reads_the_bare_velocity_however_the_base_loss_reshapes_it(stand_ins, name, shape):
    raw, reshaped = stand_ins.make(name), stand_ins.make(name, model_prediction_type=shape)
    for stand_in in (raw, reshaped):
        install(stand_in, FreqLossConfig(dist_match=0.1))
        stand_in.process_batch()
    assert torch.equal(raw.passes[0][0], reshaped.passes[0][0])
    assert not torch.equal(raw.passes[1][0], reshaped.passes[1][0])


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_masked_loss_masks_the_latents_by_the_conditioning_images(stand_ins, name):
    """With masked_loss the mask is the red channel of a picture in -1..1, averaged down to the size of the latents."""
    stand_in = stand_ins.make(name, masked_loss=True)
    masks = torch.rand(3, 16, 12)
    pictures = torch.zeros(3, 3, 128, 96)
    pictures[:, 0] = masks.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2) * 2 - 1
    stand_in.batch["conditioning_images"] = pictures
    base = stand_in.process_batch()
    install(stand_in, FreqLossConfig(dist_match=0.1))
    loss = stand_in.process_batch()
    low, high = expected_bands(stand_in, stand_in.passes[0], mask=masks.double().numpy()[:, None])
    assert (loss - base).item() == pytest.approx(0.1 * (0.7 * low + 0.3 * high), rel=1e-4)


@pytest.mark.sd_scripts
@pytest.mark.parametrize(
    "options",
    [{"dist_match": 0.1}, {"share": 0.5}, {"share": 0.5, "timesteps": "own", "max_timestep": 1000}],
    ids=["unified", "unified share", "own share"],
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
def test_differential_output_preservation(stand_ins):
    """sd-scripts replaces the targets of some samples by the untrained model's output; the term follows."""
    stand_in = stand_ins.make("sd15")
    stand_in.batch["custom_attributes"] = [{"diff_output_preservation": True}, {}, {}]
    multipliers = []
    networks = argparse.Namespace(set_multiplier=multipliers.append)
    call_unet = stand_in.trainer.call_unet

    def call_unet_of_a_network(args, accelerator, unet, noisy, timesteps, *rest, indices=None, **named):
        if indices is not None:
            noisy, timesteps = noisy[indices], timesteps[indices]
        return call_unet(args, accelerator, unet, noisy, timesteps, *rest, **named)

    stand_in.trainer.call_unet = call_unet_of_a_network
    original = stand_in.trainer.process_batch
    stand_in.trainer.process_batch = functools.wraps(original)(
        lambda batch, encoders, unet, _, *rest, **named: original(batch, encoders, unet, networks, *rest, **named)
    )
    base = stand_in.process_batch()
    install(stand_in, FreqLossConfig(dist_match=0.1))
    loss = stand_in.process_batch()
    prediction, target, _ = stand_in.passes[0]
    assert torch.equal(prediction[0], target[0])
    assert not torch.equal(prediction[1], target[1])
    low, high = expected_bands(stand_in, stand_in.passes[0])
    assert (loss - base).item() == pytest.approx(0.1 * (0.7 * low + 0.3 * high), rel=1e-4)
    assert multipliers == [0.0, 1.0] * 3


@pytest.mark.sd_scripts
def test_a_term_that_is_not_finite_stops_before_the_optimizer(stand_ins):
    stand_in = stand_ins.make("sd15")
    hook = install(stand_in, FreqLossConfig(dist_match=0.1))
    stand_in.process_batch()
    stand_in.trainer.all_reduce_network(stand_in.accelerator, stand_in.denoiser)
    with torch.no_grad():
        stand_in.denoiser.mix[0, 0] = float("nan")
    stand_in.process_batch()
    with pytest.raises(NonFiniteLossError, match=r"step 2.*base loss = nan.*timesteps = \d+.*not finite.*intact"):
        stand_in.trainer.all_reduce_network(stand_in.accelerator, stand_in.denoiser)
    assert hook.step == 1


@pytest.mark.sd_scripts
def test_a_trainer_that_ignores_the_timestep_is_refused(stand_ins):
    stand_in = stand_ins.make("sd15")
    original = stand_in.trainer.get_noise_pred_and_target

    @functools.wraps(original)
    def stubborn(args, *rest, **named):
        return original(argparse.Namespace(**{**vars(args), "min_timestep": 900, "max_timestep": 900}), *rest, **named)

    stand_in.trainer.get_noise_pred_and_target = stubborn
    install(stand_in, FreqLossConfig(dist_match=0.1))
    with pytest.raises(UnsupportedTrainerError, match=r"asked NetworkTrainer for timesteps \[\d+.*900.*'own'"):
        stand_in.process_batch()


@pytest.mark.sd_scripts
def test_uninstalling_gives_the_trainer_back(stand_ins):
    stand_in = stand_ins.make("sdxl")
    base = stand_in.process_batch()
    hook = install(stand_in, FreqLossConfig(dist_match=0.1))
    assert not torch.equal(stand_in.process_batch(), base)
    hook.uninstall()
    assert "process_batch" not in vars(stand_in.trainer)
    stand_in.passes.clear()
    assert torch.equal(stand_in.process_batch(), base)
    assert len(stand_in.passes) == 1  # the recorder that was on the object before the hook is back
    # A second training on the same object replaces the first hook instead of stacking on it.
    install(stand_in, FreqLossConfig(dist_match=0.1))
    once = stand_in.process_batch()
    install(stand_in, FreqLossConfig(dist_match=0.1))
    assert torch.equal(stand_in.process_batch(), once)


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_no_option_of_sd_scripts_looks_like_one_of_ours(stand_ins, name):
    args = stand_ins.make(name).args
    assert FreqLossConfig.from_mapping(args) == FreqLossConfig()


@pytest.mark.sd_scripts
@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("flux", {"freq_loss_sample_weights": "min_snr"}, ["'min_snr'", "predicts 'flow'", "'none'"]),
        ("sd3", {"freq_loss_sample_weights": "min_snr"}, ["'min_snr'", "predicts 'sample'"]),
        (
            "flux",
            {"freq_loss_timesteps": "own", "model_prediction_type": "sigma_scaled"},
            ["'own'", "'sigma_scaled'", "model_prediction_type = 'raw'", "'unified'"],
        ),
        (
            "flux",
            {"freq_loss_validation": True, "model_prediction_type": "additive"},
            ["freq_loss_validation", "'additive'", "model_prediction_type = 'raw'"],
        ),
        ("sd15", {"freq_loss_share": -1}, ["freq_loss_share = -1", ">= 0"]),
        ("sd15", {"freq_loss_grad_cosine": "yes"}, ["freq_loss_grad_cosine = 'yes'", "true or false"]),
        ("flux", {"blocks_to_swap": 10}, ["'unified'", "blocks_to_swap = 10", "'shared'"]),
        (
            "sd15",
            {"zero_terminal_snr": True, "freq_loss_max_timestep": 1000},
            ["freq_loss_max_timestep = 1000", "zero_terminal_snr", "v_parameterization"],
        ),
        ("sd15", {"freq_loss_network_module": "kohya_patch"}, ["cannot wrap itself", "networks.lora"]),
        ("sd15", {"freq_loss_network_module": "nonsense.lora"}, ["'nonsense.lora'", "no such Python module"]),
        (
            "flux",
            {"freq_loss_network_module": "networks.loha"},
            ["'networks.loha'", "this trainer is FLUX / Chroma", "SDXL and Anima only", "'lycoris.kohya'"],
        ),
        ("sd15", {"resolution": "16,64", "freq_loss_levels": 2}, ["freq_loss_levels = 2", "2 × 2"]),
        ("sd15", {"network_args": ["freq_loss_metod=fft"]}, ["freq_loss_metod", "Did you mean freq_loss_method?"]),
        ("sd15", {"network_args": ["dist_match=none"]}, ["dist_match = 'none'", "a number"]),
        (
            "sd15",
            {"guidance_token": 8.0, "train_data_dir": "/nowhere"},
            ["train_data_dir = '/nowhere'", "no such folder"],
        ),
        ("sdxl", {"guidance_token": 8.0}, ["guidance_token = 8", "this trainer is SDXL", "set guidance_token = 0"]),
        ("flux", {"guidance_token": 8.0}, ["guidance_token = 8", "this trainer is FLUX", "set guidance_token = 0"]),
    ],
)
def test_combinations_that_cannot_work_are_refused(stand_ins, name, settings, words):
    needs_module(settings.get("freq_loss_network_module"))
    stand_in = stand_ins.make(name, **settings)
    with pytest.raises(ConfigError) as caught:
        network.check(Training(stand_in.trainer, stand_in.args))
    for word in words:
        assert word in str(caught.value)


def needs_module(name):
    """Skip where a module of sd-scripts came with a later version."""
    if name in host.NETWORK_MODULES and not (hosts.sd_scripts() / f"{name.replace('.', '/')}.py").is_file():
        pytest.skip(f"{hosts.SD_SCRIPTS.title(hosts.sd_scripts())} has no {name}")


@pytest.mark.sd_scripts
@pytest.mark.parametrize("module", host.NETWORK_MODULES)
@pytest.mark.parametrize("timesteps", ["unified", "shared"])
def test_sd_scripts_own_loha_and_lokr_train_sdxl(stand_ins, monkeypatch, module, timesteps):
    """Its own U-Net with a tenth of the channels, and the network that its own module makes for it."""
    needs_module(module)
    options = {"dist_match": 0.1, "freq_loss_timesteps": timesteps, "freq_loss_max_timestep": 1000}
    stand_in = stand_ins.make("sdxl", freq_loss_network_module=module, **options)
    stand_in.batch["text_encoder_outputs_list"] = [torch.randn(3, 7, size) for size in (768, 1280)]
    stand_in.batch["text_encoder_outputs_list"].append(torch.randn(3, 1280))
    from library import sdxl_original_unet

    monkeypatch.setattr(sdxl_original_unet, "MODEL_CHANNELS", 32)
    monkeypatch.setattr(sdxl_original_unet, "TIME_EMBED_DIM", 128)
    stand_in.denoiser = sdxl_original_unet.SdxlUNet2DConditionModel().requires_grad_(False)
    args = stand_in.args

    class StartingTrainer(type(stand_in.trainer)):
        def train(self, args):
            return kohya_patch.create_network(1.0, 4, 4.0, None, [None, None], stand_in.denoiser, neuron_dropout=None)

    stand_in.trainer.__class__ = StartingTrainer
    made = stand_in.trainer.train(args)
    assert type(made).__module__ == "networks.network_base"
    made.apply_to(None, stand_in.denoiser, apply_text_encoder=False)
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
    for _ in range(4):
        loss = stand_in.process_batch()
        stand_in.accelerator.backward(loss)
        (numbers,) = stand_in.trainer._freq_loss_hook._monitor.settle(1)
        optimizer.step()
        if numbers.total > 0:
            low, high = expected_bands(stand_in, stand_in.passes[0])
            assert numbers.total == pytest.approx(0.1 * (0.7 * low + 0.3 * high), rel=1e-4)
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())
    assert sum(parameter.grad.abs().sum() for parameter in made.parameters()) > 0
    metadata = {}
    stand_in.trainer.update_metadata(metadata, args)
    assert metadata["ss_network_module"] == module


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_every_trainer_passes_the_check_and_names_its_own_lora(stand_ins, name):
    stand_in = stand_ins.make(name)
    training = Training(stand_in.trainer, stand_in.args)
    assert network.check(training).enabled
    path = hosts.sd_scripts() / (training.family.network_module.replace(".", "/") + ".py")
    assert path.is_file()


@pytest.mark.sd_scripts
def test_an_error_names_the_version_that_was_found_and_those_that_work(stand_ins):
    found = str(host.unsupported(type(stand_ins.make("sdxl").trainer), "a method", "none"))
    command = ["git", "-C", str(hosts.sd_scripts()), "log", "-1", "--format=%H %cs"]
    commit, date = subprocess.run(command, capture_output=True, text=True).stdout.split()
    for word in (commit[:7], date, str(hosts.sd_scripts()), "(commit d0b5c0e5) to v0.11.1", "dev branch at 37a1cbb"):
        assert word in found


# Without sd-scripts


class NetworkTrainer:
    """Just the outside of sd-scripts' class of that name."""

    def process_batch(self, batch, noise_scheduler, accelerator, args, is_train=True): ...

    def get_noise_pred_and_target(self, args, latents, text_encoder_conds, is_train=True): ...

    def all_reduce_network(self, accelerator, network): ...

    def generate_step_logs(self): ...

    def update_metadata(self, metadata, args): ...

    def train(self, args):
        return find_training()


def test_the_training_is_found_on_the_stack_and_nowhere_else():
    trainer, args = NetworkTrainer(), argparse.Namespace()
    found = trainer.train(args)
    assert found.trainer is trainer
    assert found.args is args
    assert find_training() is None
    with pytest.raises(UnsupportedTrainerError, match="no training of sd-scripts is running"):
        network.create_network(1.0, 4, 4, None, None, None)


@pytest.mark.parametrize("missing", ["process_batch", "get_noise_pred_and_target", "all_reduce_network"])
def test_a_missing_method_is_named(missing):
    outdated = type("NetworkTrainer", (NetworkTrainer,), {missing: None})
    with pytest.raises(UnsupportedTrainerError, match=rf"method {missing} .*v0\.9\.1 and older.*git pull"):
        host.check_methods(outdated)


def test_a_missing_parameter_is_named():
    class Moved(NetworkTrainer):
        def get_noise_pred_and_target(self, args, clean, text_encoder_conds, is_train=True): ...

    with pytest.raises(
        UnsupportedTrainerError,
        match=r"latents among the parameters of Moved\.get_noise_pred_and_target, and found self, args, clean, ",
    ):
        host.check_methods(Moved)
    host.check_methods(NetworkTrainer)


def test_subclasses_belong_to_the_nearest_family():
    flux = type("FluxNetworkTrainer", (NetworkTrainer,), {})
    special = type("MyFluxTrainer", (flux,), {})
    assert Training(special(), argparse.Namespace()).family.name == "FLUX / Chroma"
    assert Training(NetworkTrainer(), argparse.Namespace()).family.name == "SD1.x / SD2.x"


@pytest.mark.parametrize("timestep", [0, 1, 200, 599, 999])
def test_one_timestep_by_the_flow_trainers_own_formula(timestep):
    args = argparse.Namespace(min_timestep=None, max_timestep=None, timestep_sampling="sigma", untouched=5)
    fixed = at_one_timestep(args, timestep)
    x = torch.sigmoid(fixed.sigmoid_scale * (torch.randn(4) + torch.tensor([0, 0.5, -0.5, 3])))
    sigma = x * fixed.discrete_flow_shift / (1 + (fixed.discrete_flow_shift - 1) * x)
    torch.testing.assert_close(sigma, torch.full((4,), timestep / 1000), rtol=1e-5, atol=1e-7)
    assert fixed.min_timestep == fixed.max_timestep == timestep
    assert args.min_timestep is None
    assert fixed.untouched == 5


def test_the_first_step_of_a_resumed_training(tmp_path):
    (tmp_path / "train_state.json").write_text('{"current_epoch": 2, "current_step": 40}')
    assert first_step(argparse.Namespace()) == 0
    assert first_step(argparse.Namespace(resume=str(tmp_path))) == 40
    assert first_step(argparse.Namespace(resume=str(tmp_path / "elsewhere"))) == 0
    assert first_step(argparse.Namespace(resume=str(tmp_path), initial_step=7)) == 7


def test_deferred_scalars_are_the_scalars():
    assert DeferredScalars(torch.tensor(1.5), torch.tensor(2.5, dtype=torch.bfloat16)).read() == [1.5, 2.5]


@pytest.mark.parametrize(
    ("share", "level", "words"),
    [
        (0.005, logging.WARNING, "too little to act; multiply dist_match by 22"),
        (0.1, logging.INFO, "10.00% of the loss on average"),
        (0.8, logging.WARNING, "more than the base loss"),
    ],
)
def test_the_share_is_told_once_after_fifty_steps(caplog, share, level, words):
    pytest.importorskip("accelerate")
    caplog.set_level(logging.INFO, logger="kohya_patch")
    shares = ShareReport(1000)
    for step in range(1, 120):
        shares.add(share)
        report.tell(shares.after_step(step))
        assert len(caplog.records) == (step >= 50)
    assert caplog.records[0].levelno == level
    assert words in caplog.text


@pytest.mark.parametrize(
    ("options", "trainer", "words"),
    [
        ({}, {"min_timestep": 0, "max_timestep": 1000}, None),
        ({}, {}, None),
        ({}, {"max_timestep": 400}, "the extra pass trains timesteps that the base loss leaves alone"),
        ({"timesteps": "own"}, {"max_timestep": 400}, "only 200..400 of it is ever drawn"),
        ({"timesteps": "own"}, {"min_timestep": 700}, "the term is always 0"),
        ({"dist_match": 0}, {"min_timestep": 700}, None),
    ],
)
def test_a_window_outside_the_trainers_own_is_told(options, trainer, words):
    window = (trainer.get("min_timestep"), trainer.get("max_timestep"))
    warnings = freq_loss_plugin.report.warnings(FreqLossConfig(**options), 4, *window)
    assert (not warnings) if words is None else words in warnings[0]


def announced(config, capsys, caplog, **args):
    """What is said at the start of an SD1.x training with these options and arguments: (block, warnings)."""
    pytest.importorskip("accelerate")
    training = Training(NetworkTrainer(), argparse.Namespace(**args))
    with caplog.at_level(logging.WARNING, logger="kohya_patch"):
        report.announce(training, config, "networks.lora")
    return " ".join(capsys.readouterr().out.split()), caplog.text


def test_the_block_tells_a_fallback_and_drops_what_no_longer_matters(monkeypatch, capsys, caplog):
    monkeypatch.setattr("freq_loss_plugin.config.resolve_method", lambda method: "fft")
    block, _ = announced(FreqLossConfig(), capsys, caplog, train_batch_size=4)
    assert "freq_loss_method = wavelet -> fft: the wavelet library cannot be imported (pip install" in block
    assert "freq_loss_cutoff = 0.25" in block
    assert "freq_loss_levels" not in block


def test_the_block_tells_the_cost(capsys, caplog):
    block, warnings = announced(FreqLossConfig(timesteps="own"), capsys, caplog, train_batch_size=4)
    assert "cost: no extra pass" in block
    assert warnings == ""


def test_useless_settings_are_warnings_at_the_start(capsys, caplog):
    config = FreqLossConfig(low_weight=0.5, high_weight=0.5)
    _, warnings = announced(config, capsys, caplog, train_batch_size=1, max_timestep=300)
    for words in ("plain MSE of the batch sum", "batch size 1", "not inside the trainer's own 0..300"):
        assert words in warnings


def test_the_block_tells_what_a_share_makes_of_dist_match(capsys, caplog):
    block, _ = announced(FreqLossConfig(share=0.1), capsys, caplog, train_batch_size=4)
    assert "dist_match = 0.003 (for the first batch; then by freq_loss_share)" in block
    assert "freq_loss_share = 0.1" in block
    assert "comparing gradients at the model's output" in block
    assert "grad_cosine" not in block


def test_with_a_share_the_part_of_the_loss_is_told_without_advice(caplog):
    pytest.importorskip("accelerate")
    caplog.set_level(logging.INFO, logger="kohya_patch")
    shares = ShareReport(3, held=True)
    for step in range(1, 4):
        shares.add(0.001)
        report.tell(shares.after_step(step))
    assert "0.10% of the loss on average" in caplog.text
    assert "multiply" not in caplog.text


def test_validation_without_validation_pictures_is_a_warning(capsys, caplog):
    config = FreqLossConfig(validation=True)
    _, warnings = announced(config, capsys, caplog, train_batch_size=4)
    assert "set validation_split" in warnings
    assert "set logging_dir" in warnings
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="kohya_patch"):
        args = argparse.Namespace(train_batch_size=4, logging_dir="logs")
        report.announce(Training(NetworkTrainer(), args, validates=True), config, "networks.lora")
    assert caplog.text == ""


def test_what_is_off_with_the_loss_is_named(capsys, caplog):
    config = FreqLossConfig(dist_match=0.0, share=0.1, validation=True)
    block, warnings = announced(config, capsys, caplog, train_batch_size=4)
    assert "off (dist_match = 0)" in block
    assert "turns the loss off, and with it freq_loss_share, freq_loss_validation" in warnings
    assert "grad_cosine" not in warnings


def test_a_trainer_that_logs_in_another_way_cannot_validate_in_bands():
    with pytest.raises(UnsupportedTrainerError, match="the method accelerator_logging"):
        host.check_methods(NetworkTrainer, host.VALIDATION_METHODS)


def test_a_state_without_our_file_begins_anew_and_says_so(tmp_path, caplog):
    pytest.importorskip("accelerate")
    config, args = FreqLossConfig(memory=2, share=0.1), argparse.Namespace(resume=str(tmp_path))
    kept = ResidualMemory(config), Balance(config)
    with caplog.at_level(logging.WARNING, logger="kohya_patch"):
        state = StateFile(config, args, *kept)
    assert "freq_loss_memory begins anew" in caplog.text
    assert "freq_loss_share begins anew" in caplog.text
    kept[0].join(torch.randn(4, 8, 8))
    kept[1].share.observe(base=torch.ones(3), term=torch.ones(3))
    state._save(None, None, str(tmp_path))
    caplog.clear()
    again = ResidualMemory(config), Balance(config)
    StateFile(config, args, *again)
    assert caplog.text == ""
    for before, after in zip((kept[0], kept[1].share), (again[0], again[1].share), strict=True):
        assert before.state_dict().keys() == after.state_dict().keys() != set()
        for name, value in before.state_dict().items():
            assert torch.equal(after.state_dict()[name], value)


def test_off_says_only_that_it_is_off(capsys, caplog):
    block, warnings = announced(FreqLossConfig(dist_match=0), capsys, caplog, train_batch_size=1, min_timestep=700)
    assert "off (dist_match = 0); networks.lora trains exactly as without the plug-in" in block
    assert warnings == ""
