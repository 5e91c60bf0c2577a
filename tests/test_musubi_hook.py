"""The hook on the trainers of musubi-tuner: the formula, timesteps, balance and image quality, against the oracle."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from balance_oracle import Expected
from scipy import stats

from freq_loss_plugin import ConfigError, FreqLossConfig
from freq_loss_plugin.image_quality.restoration import fit
from freq_loss_plugin.image_quality.survey import Survey
from freq_loss_plugin.image_quality.trained_image import TrainedImage
from freq_loss_plugin.training.monitor import NonFiniteLossError
from kohya_patch.host import UnsupportedTrainerError
from kohya_patch.image_quality import ImageQuality
from kohya_patch.musubi import network, timesteps
from kohya_patch.musubi.hook import LossHook
from kohya_patch.musubi.trainers import FAMILIES, TrainingRun
from kohya_patch.protocols import IMAGES

sys.path.insert(0, str(Path(__file__).parent / "musubi_host"))
import musubi_stand_ins

# The host's own warnings are none of this project's business.
pytestmark = [pytest.mark.musubi_tuner, pytest.mark.versions, pytest.mark.filterwarnings("default")]

NAMES = list(musubi_stand_ins.TRAINERS)
# Of those with a fixed distribution of their own; the others depend on the size of the latents alone.
SAMPLINGS = ["sigma", "uniform", "sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift"]
SAMPLINGS += ["ideogram4_shift", "logsnr", "qinglong_flux", "qinglong_qwen"]


def install(stand_in, quality=None, **options):
    run = TrainingRun(stand_in.trainer, stand_in.args)
    hook = LossHook(run, FreqLossConfig(**options), "networks.lora_flux_2", quality)
    hook.install()
    return hook


def expected_term(used, config, counted=None):
    """dist_match · (0.7·L_low + 0.3·L_high) of a recorded pass by the oracle."""
    prediction, target, sigma, _ = used
    low, high = oracle.loss(
        prediction.detach().double().numpy(),
        target.double().numpy(),
        np.zeros(prediction.shape),
        prediction_type="flow",
        timesteps=(1000 * sigma.double()).clamp(max=999).tolist(),
        alphas_cumprod=np.ones(1000),
        weights=np.ones(len(prediction)) if counted is None else counted,
        bands=oracle.wavelet_bands,
    )
    return config.dist_match * (config.low_weight * low + config.high_weight * high)


@pytest.mark.parametrize("name", NAMES)
def test_unified_adds_the_formula_of_an_extra_pass_at_one_timestep(name):
    stand_in = musubi_stand_ins.make(name)
    plain = stand_in.process_batch()
    (own,) = stand_in.passes
    hook = install(stand_in, dist_match=0.05)
    loss = stand_in.process_batch()
    extra, base = stand_in.passes
    for one, other in zip(base, own, strict=True):
        assert torch.equal(one, other)  # its noise and timesteps are what they were
    sigma = extra[2]
    assert sigma.std() < 1e-5
    assert 0.2 <= sigma[0] < 0.6
    assert not torch.allclose(extra[3], base[3])
    term = expected_term(extra, hook.term.config)
    assert loss.item() - plain.item() == pytest.approx(term, rel=1e-3)
    hook._end_step()
    assert hook._logs["loss/freq_total"] == pytest.approx(term, rel=1e-4)


@pytest.mark.parametrize("name", ["flux_2", "zimage", "wan", "kandinsky5"])
def test_the_gradient_of_unified_is_that_of_base_loss_plus_term(name):
    stand_in = musubi_stand_ins.make(name)
    install(stand_in, dist_match=0.05)
    stand_in.process_batch().backward()
    whole = [parameter.grad.clone() for parameter in stand_in.denoiser.parameters()]
    extra, base = stand_in.passes
    stand_in.denoiser.zero_grad()

    def residual(used):
        """Of the stand-in's model once more, on the same noisy latents."""
        prediction = stand_in.denoiser(used[3])
        return (prediction.transpose(1, 2) if name == "kandinsky5" else prediction) - used[1]

    sigma = extra[2].view(-1, *[1] * (extra[0].ndim - 1))
    low, high = FreqLossConfig().bands.split((sigma * residual(extra)).sum(dim=0, keepdim=True))
    term = 0.05 * (0.7 * low.square().mean() + 0.3 * high.square().mean())
    (residual(base).square().mean() + term).backward()
    for parameter, found in zip(stand_in.denoiser.parameters(), whole, strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["flux_2", "zimage", "wan", "hv", "kandinsky5"])
def test_shared_and_own_add_the_formula_of_the_trainers_pass(name):
    for mode in ("shared", "own"):
        stand_in = musubi_stand_ins.make(name, discrete_flow_shift=1.0)
        hook = install(stand_in, dist_match=0.05, timesteps=mode)
        inside = 0
        for seed in range(12):
            loss = stand_in.process_batch(seed)
            (used,) = stand_in.passes
            prediction, target, sigma, _ = used
            counted = [float(200 <= 1000 * s < 600) for s in sigma.tolist()]
            if mode == "shared":
                assert len(set(counted)) == 1  # all inside, at one timestep, or all outside
                assert sigma.std() < 1e-5 or not counted[0]
            inside += sum(counted)
            base = (prediction - target).square().mean().item()
            assert loss.item() == pytest.approx(base + expected_term(used, hook.term.config, counted), rel=1e-3)
        assert 0 < inside < 12 * musubi_stand_ins.BATCH


@pytest.mark.parametrize("sampling", ["sigma", "shift", "logsnr", "qinglong_flux"])
def test_shared_leaves_the_trainers_random_numbers_where_they_would_be(sampling):
    stand_in = musubi_stand_ins.make("flux_2", timestep_sampling=sampling)
    stand_in.process_batch()
    state = torch.get_rng_state()
    install(stand_in, dist_match=0.05, timesteps="shared")
    stand_in.process_batch()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_off_is_the_trainers_own_step(name):
    stand_in = musubi_stand_ins.make(name)
    plain, state = stand_in.process_batch(), torch.get_rng_state()
    install(stand_in, dist_match=0.0)
    assert torch.equal(stand_in.process_batch(), plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(stand_in.trainer.extra_metadata(stand_in.args)) == ["ss_network_module"]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("preserve", [False, True])
def test_every_distribution_can_be_made_to_use_chosen_timesteps(sampling, preserve):
    stand_in = musubi_stand_ins.make(
        "flux_2", timestep_sampling=sampling, preserve_distribution_shape=preserve, min_timestep=100, max_timestep=900
    )
    latents, noise = torch.randn(3, 128, 8, 6), torch.randn(3, 128, 8, 6)
    given = {"args": stand_in.args, "noise": noise, "latents": latents, "timesteps": None}
    given |= {"noise_scheduler": stand_in.scheduler, "device": torch.device("cpu"), "dtype": torch.float32}
    method, wanted = stand_in.trainer.get_noisy_model_input_and_timesteps, torch.tensor([123.0, 456.0, 999.0])
    state = torch.get_rng_state()
    noisy, returned, fixed = timesteps.at(method, given, wanted, "a stream")
    sigma = (wanted / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, (1 - sigma) * latents + sigma * noise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(timesteps.on_scale(returned, fixed), wanted, rtol=0, atol=1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    # What it draws by itself is on the same scale as what it mixes.
    noisy, returned = method(**given)
    sigma = (timesteps.on_scale(returned, stand_in.args) / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, (1 - sigma) * latents + sigma * noise, rtol=1e-4, atol=1e-4)
    drawn = torch.cat([timesteps.draw(method, given, 64) for _ in range(4)])
    assert drawn.min() >= 99
    assert drawn.max() <= 901


@pytest.mark.parametrize("mode", ["timestep", "band"])
@pytest.mark.parametrize("name", ["flux_2", "zimage", "wan", "kandinsky5"])
def test_the_balanced_loss_is_that_of_the_oracle(name, mode):
    stand_in = musubi_stand_ins.make(name)
    install(stand_in, dist_match=0.0, balance=mode)
    expected = Expected(mode)
    for seed in range(6):
        loss = stand_in.process_batch(seed)
        (used,) = stand_in.passes
        residual = (used[0] - used[1]).detach().double().numpy()
        at = (1000 * used[2].double()).tolist()
        expected.observe(residual, at)
        assert loss.item() == pytest.approx(expected.loss(residual, at), rel=1e-4)


def test_with_a_batch_of_one_the_balance_and_the_term_are_defined(caplog):
    stand_in = musubi_stand_ins.make("flux_2")
    stand_in.batch["latents"] = stand_in.batch["latents"][:1]
    hook = install(stand_in, dist_match=0.05, balance="band", timesteps="shared", gradient_ratio=0.1)
    for seed in range(8):
        stand_in.process_batch(seed).backward()
        hook._end_step()
    assert all(np.isfinite(value) for value in hook._logs.values())


LEAST = {"sharp": 0, "bad": 600, "worse": 850}


@pytest.mark.parametrize("sampling", ["shift", "sigma", "uniform"])
@pytest.mark.parametrize("mode", ["off", "shared"])
@pytest.mark.parametrize("name", ["flux_2", "wan"])
def test_bad_images_train_above_their_least_timestep_and_sharp_ones_as_ever(name, mode, sampling):
    stand_in = musubi_stand_ins.make(name, timestep_sampling=sampling)
    before = []
    for seed in range(30):
        stand_in.process_batch(seed)
        before.append(stand_in.passes[0])
    named = {image: TrainedImage(Path(image)) for image in LEAST}
    survey = Survey({named[image]: least for image, least in LEAST.items() if least}, {}, "as given", ())
    stand_in.batch[IMAGES] = list(LEAST)
    options = {"dist_match": 0.0} if mode == "off" else {"dist_match": 0.01, "timesteps": "shared"}
    install(stand_in, ImageQuality(survey, named, dict.fromkeys(named, 1)), image_quality="auto", **options)
    drawn = []
    for seed in range(30):
        stand_in.process_batch(seed)
        (used,) = stand_in.passes
        drawn.append(1000 * used[2])
        if mode == "off":
            kept = 1000 * before[seed][2] >= torch.tensor([0, 600, 850])
            torch.testing.assert_close(used[3][kept], before[seed][3][kept], rtol=1e-4, atol=1e-5)
            assert kept[0]
    drawn = torch.stack(drawn)
    assert (drawn + 0.1 >= torch.tensor([0, 600, 850])).all()
    if mode == "off":  # above its least timestep, as the trainer draws there
        own = torch.stack([1000 * each[2] for each in before]).flatten()
        assert stats.ks_2samp(drawn[:, 1].numpy(), own[own >= 600].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_defective_images_train_on_restored_latents(name):
    """A defect that moved all latents of the second sample by -1; its target moves, and nothing else does."""
    plain, stand_in = musubi_stand_ins.make(name), musubi_stand_ins.make(name)
    latents = plain.trainer.scale_shift_latents(plain.batch["latents"]).float()
    sharp = list((latents.transpose(1, 2) if latents.ndim == 5 else latents).flatten(0, -4))
    named = {image: TrainedImage(Path(image)) for image in LEAST}
    survey = Survey({}, {named["bad"]: fit(sharp, [one - 1 for one in sharp])}, "as given", ())
    stand_in.batch[IMAGES] = list(LEAST)
    given = stand_in.batch["latents"].clone()
    install(stand_in, ImageQuality(survey, named, dict.fromkeys(named, 1)), image_quality="auto", dist_match=0.0)
    for seed in range(3):
        plain.process_batch(seed)
        stand_in.process_batch(seed)
        moved = stand_in.passes[-1][1].float() - plain.passes[-1][1].float()
        assert moved[[0, 2]].abs().max() == 0
        torch.testing.assert_close(moved[1].abs(), torch.ones_like(moved[1]), rtol=0, atol=0.03)
    assert torch.equal(stand_in.batch["latents"], given)


def test_a_trainer_that_draws_elsewhere_is_refused(monkeypatch):
    """It would ignore the timesteps that were chosen, and nothing else would show it."""
    stand_in = musubi_stand_ins.make("flux_2")
    install(stand_in, dist_match=0.05, timesteps="shared")
    trainer = type(stand_in.trainer)
    monkeypatch.setattr(
        stand_in.trainer,
        "get_noisy_model_input_and_timesteps",
        functools.partial(trainer.get_noisy_model_input_and_timesteps, stand_in.trainer),
    )
    with pytest.raises(UnsupportedTrainerError, match=r"one call of get_noisy_model_input_and_timesteps .* found 0"):
        stand_in.process_batch()


def test_a_term_that_is_not_finite_stops_before_the_optimizer_steps():
    from accelerate import Accelerator

    stand_in = musubi_stand_ins.make("flux_2")
    install(stand_in, dist_match=0.05)
    stand_in.batch["latents"] = stand_in.batch["latents"].clone()
    stand_in.batch["latents"][0] = float("nan")
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.AdamW(stand_in.denoiser.parameters()))
    stand_in.trainer.on_train_start(stand_in.args, accelerator, None, None, optimizer)
    before = stand_in.denoiser.offset.detach().clone()
    stand_in.process_batch().backward()
    with pytest.raises(NonFiniteLossError):
        optimizer.step()
    assert torch.equal(stand_in.denoiser.offset, before)


def test_numbers_are_read_once_for_each_optimizer_step_even_where_a_scaler_skips_it():
    stand_in = musubi_stand_ins.make("flux_2")
    hook = install(stand_in, dist_match=0.05)
    optimizer = torch.optim.SGD(stand_in.denoiser.parameters(), lr=0.1)
    stand_in.trainer.on_train_start(stand_in.args, stand_in.accelerator, None, None, optimizer)

    def end_batch(*, syncs, steps):
        stand_in.process_batch().backward()
        if steps:
            optimizer.step()
        stand_in.trainer.on_post_optimizer_step(stand_in.args, stand_in.accelerator, None, None, syncs, 0)

    end_batch(syncs=False, steps=False)
    assert hook.step == 0
    end_batch(syncs=True, steps=True)
    assert hook.step == 1
    end_batch(syncs=True, steps=False)
    assert hook.step == 2
    logs = stand_in.trainer.extra_step_logs(stand_in.args, {})
    assert {"loss/freq_low", "loss/freq_high", "loss/freq_total", "loss/freq_fraction"} <= logs.keys()


AUTO = {"dist_match": 0.0, "freq_loss_image_quality": "auto"}
REFUSED = {
    "pixels": ("hidream_o1", {}, "HiDream-O1 predicts patches of pixels"),
    "tokens": ("self_flow", {}, "FLUX.2 Self-Flow trains each token at a noise level of its own"),
    "video and audio": (
        "minimax_h3",
        {},
        "MiniMax-H3 trains video and audio together, each at a noise level of its own",
    ),
    "two models": ("wan", {"dit_high_noise": "x"}, "freq_loss_timesteps = 'unified' with dit_high_noise"),
    "two models, images": ("wan", {"dit_high_noise": "x", **AUTO}, "freq_loss_image_quality with dit_high_noise"),
    "layers": ("qwen_image", {"is_layered": True, **AUTO}, "freq_loss_image_quality with is_layered"),
    "deepspeed": ("wan", {"deepspeed": True}, "DeepSpeed is on"),
}


@pytest.mark.parametrize(("name", "settings", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_defined_is_refused_by_name(name, settings, words):
    undefined = {
        "hidream_o1": ("hidream_o1_train_network", "HiDreamO1NetworkTrainer"),
        "self_flow": ("flux_2_train_network_self_flow", "Flux2SelfFlowNetworkTrainer"),
        "minimax_h3": ("minimax_h3_train_network", "MiniMaxH3NetworkTrainer"),
    }
    stand_in = musubi_stand_ins.make("flux_2" if name in undefined else name, **{"dist_match": 0.05, **settings})
    trainer = stand_in.trainer
    if name in undefined:
        script, cls = undefined[name]
        trainer = object.__new__(getattr(musubi_stand_ins.load(script), cls))
    with pytest.raises(ConfigError, match=words):
        network.check(TrainingRun(trainer, stand_in.args))
    vars(stand_in.args).update(dist_match=0.0, freq_loss_image_quality="off")
    network.check(TrainingRun(trainer, stand_in.args))  # off, everything may train


def test_a_trainer_that_mixes_other_noise_levels_is_refused_before_it_trains(monkeypatch):
    stand_in = musubi_stand_ins.make("flux_2", timestep_sampling="sigma", preserve_distribution_shape=True)
    state = torch.get_rng_state()
    timesteps.check(stand_in.trainer, stand_in.args)
    assert torch.equal(torch.get_rng_state(), state)
    method = stand_in.trainer.get_noisy_model_input_and_timesteps

    def without_limits(args, **named):
        return method(argparse.Namespace(**{**vars(args), "min_timestep": 0, "max_timestep": 1000}), **named)

    monkeypatch.setattr(stand_in.trainer, "get_noisy_model_input_and_timesteps", without_limits)
    with pytest.raises(UnsupportedTrainerError, match=r"musubi-tuner .* the noise levels \[100.0, 700.0\]"):
        timesteps.check(stand_in.trainer, stand_in.args)


def test_batches_that_name_their_images_survive_being_sent_to_a_loader_process():
    import pickle

    from kohya_patch.musubi import image_names

    musubi_stand_ins.load("flux_2_train_network")
    from musubi_tuner.dataset.bucket import BucketBatchManager

    manager = BucketBatchManager({}, 2)
    image_names.add_to([argparse.Namespace(batch_manager=manager)])
    copied = pickle.loads(pickle.dumps(manager))
    assert type(copied) is type(manager) is not BucketBatchManager
    assert copied.batch_size == 2


def test_every_trainer_of_the_checkout_is_known():
    import hosts

    folder = hosts.musubi_tuner() / "src" / "musubi_tuner"
    classes = {
        line.split()[1].split("(")[0]
        for script in folder.glob("*_train_network*.py")
        for line in script.read_text("utf-8").splitlines()
        if line.startswith("class ") and "NetworkTrainer(" in line
    }
    newer = {"MiniMaxH3NetworkTrainer"} - classes  # than 0.3.4
    assert classes == FAMILIES.keys() - newer
    for family in (FAMILIES[name] for name in classes):
        assert (folder / f"{family.network_module.replace('.', '/')}.py").is_file()
        assert (folder / f"{family.latent_cache}.py").is_file()


def test_metadata_can_be_asked_for_at_every_save():
    """As musubi-tuner does since its version of 2026-08-14."""
    survey = Survey({}, {}, "as given", ())
    stand_in = musubi_stand_ins.make("flux_2")
    stand_in.batch[IMAGES] = ["sharp"] * musubi_stand_ins.BATCH
    hook = install(stand_in, ImageQuality(survey, {}, {}), dist_match=0.05, balance="band", timesteps="shared")
    first = stand_in.trainer.extra_metadata(stand_in.args)
    for seed in range(3):
        stand_in.process_batch(seed)
        hook._end_step()
        before, random = hook.term.state_dict(), torch.get_rng_state()
        assert stand_in.trainer.extra_metadata(stand_in.args) == first
        assert torch.equal(torch.get_rng_state(), random)
        torch.testing.assert_close(hook.term.state_dict(), before, rtol=0, atol=0)
    assert first["ss_freq_loss_image_quality_summary"] == "as given"
