"""Images with a least timestep in the trainers of sd-scripts, on single batches."""

from __future__ import annotations

from pathlib import Path

import oracle
import pytest
import torch
from bad_images import enlarged, scene
from hooked import NAMES, expected_bands
from scipy import stats

from freq_loss_plugin import ConfigError, FreqLossConfig
from freq_loss_plugin.image_quality.restoration import fit
from freq_loss_plugin.image_quality.survey import Survey
from freq_loss_plugin.image_quality.trained_image import TrainedImage
from kohya_patch.image_quality import ImageQuality
from kohya_patch.protocols import IMAGES
from kohya_patch.sd_scripts.hook import LossHook
from kohya_patch.sd_scripts.image_quality import _Encoder
from kohya_patch.sd_scripts.trainers import TrainingRun

# The host's own warnings are none of this project's business.
pytestmark = [pytest.mark.sd_scripts, pytest.mark.filterwarnings("default")]

SHARP, BAD, WORSE = "sharp.png", "bad.png", "worse.png"
LEAST = {BAD: 600, WORSE: 850}


def install(stand_in, images, restorations=None, **options):
    """The hook on a batch of these images, whose survey is given; an epoch has one of each kind."""
    named = {image: TrainedImage(Path(image)) for image in (SHARP, *LEAST)}
    least = {named[image]: least for image, least in LEAST.items()}
    filters = {named[image]: one for image, one in (restorations or {}).items()}
    quality = ImageQuality(Survey(least, filters, "as given", ()), named, dict.fromkeys(named, 1))
    stand_in.batch[IMAGES] = images
    config = FreqLossConfig(**{"dist_match": 0.0, "image_quality": "auto", **options})
    hook = LossHook(TrainingRun(stand_in.trainer, stand_in.args), config, "networks.lora", quality=quality)
    hook.install()
    return hook


def timesteps_of(name, passed):
    return passed[2].float() * (1000 if name == "anima" else 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_sharp_images_trains_as_without(stand_ins, monkeypatch, name):
    plain = stand_ins.make(name)
    expected = [(plain.process_batch(seed=seed), plain.passes[-1]) for seed in range(3)]
    stand_in = stand_ins.make(name)
    for image in (BAD, WORSE):
        monkeypatch.delitem(LEAST, image)
    install(stand_in, [SHARP] * 3)
    for seed, (loss, passed) in enumerate(expected):
        assert torch.equal(stand_in.process_batch(seed=seed), loss)
        assert all(map(torch.equal, stand_in.passes[-1], passed))


def test_samples_weigh_nothing_else_with_epsilon_prediction(stand_ins):
    stand_in = stand_ins.make("sd15")
    hook = install(stand_in, [SHARP, BAD, WORSE])
    for seed in range(4):
        loss = stand_in.process_batch(seed=seed)
        prediction, target, _ = stand_in.passes[-1]
        assert loss.item() == pytest.approx((prediction - target).square().mean().item(), rel=1e-5)
        assert hook.term._plan.weights is None


@pytest.mark.parametrize("name", NAMES)
def test_samples_weigh_what_gives_each_noise_level_its_share(stand_ins, name):
    """A third of the images trains everywhere, and a third each from 600 and from 850 on."""
    settings = {"v_parameterization": True} if name in ("sd15", "sdxl") else {}
    plain, stand_in = stand_ins.make(name, **settings), stand_ins.make(name, **settings)
    hook = install(stand_in, [SHARP, BAD, WORSE])
    own, weights = [], []
    spied = hook.term.balance
    hook.term.balance = lambda passed: weights.append(spied(passed).weights) or spied(passed)
    for seed in range(100):
        plain.process_batch(seed=seed)
        own += timesteps_of(name, plain.passes[-1]).tolist()
    for seed in range(8):
        loss = stand_in.process_batch(seed=seed)
        prediction, target, _ = stand_in.passes[-1]
        losses = (prediction - target).square().mean(dim=(1, 2, 3))
        assert loss.item() == pytest.approx((losses * weights[-1]).mean().item(), rel=1e-3)
        for timestep, weight in zip(
            timesteps_of(name, stand_in.passes[-1]).tolist(), weights[-1].tolist(), strict=True
        ):
            above = [sum(one >= least for one in own) / len(own) for least in (0, 600, 850)]
            gained = sum((timestep >= least) / one for least, one in zip((0, 600, 850), above, strict=True)) / 3
            assert weight == pytest.approx(1 / gained, rel=0.25)


def test_defective_images_train_on_restored_latents(stand_ins):
    """The target of v-prediction and of flow matching has the latents in it; sharp images keep theirs."""
    for name in ("sd15", "flux"):
        settings = {"v_parameterization": True} if name == "sd15" else {}
        plain, stand_in = stand_ins.make(name, **settings), stand_ins.make(name, **settings)
        sharp = list(plain.batch["latents"].float())
        moved = fit(sharp, [one - 1 for one in sharp])
        assert moved.restored == pytest.approx(1, abs=1e-3)
        install(stand_in, [SHARP, BAD, WORSE], {BAD: moved})
        for seed in range(1, 9):
            plain.process_batch(seed=seed)
            stand_in.process_batch(seed=seed)
            (_, before, first), (_, after, second) = plain.passes[-1], stand_in.passes[-1]
            same = torch.isclose(first.float(), second.float(), atol=1e-3)
            if same[0]:
                torch.testing.assert_close(after[0], before[0], rtol=1e-3, atol=1e-4)
            if same[1] and name == "flux":
                torch.testing.assert_close(after[1], before[1] - 1, rtol=1e-2, atol=1e-2)
            elif same[1]:
                sigma = (1 - plain.scheduler.alphas_cumprod[int(first[1])]).sqrt()
                torch.testing.assert_close(after[1], before[1] - sigma, rtol=1e-2, atol=1e-2)
        stand_in.batch[IMAGES] = [SHARP] * 3
        plain.process_batch(seed=1)
        stand_in.process_batch(seed=1)
        torch.testing.assert_close(stand_in.passes[-1][1], plain.passes[-1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_only_timesteps_below_the_least_change(stand_ins, name):
    plain, stand_in = stand_ins.make(name), stand_ins.make(name)
    images = [BAD, SHARP, WORSE]
    install(stand_in, images)
    raised = 0
    for seed in range(1, 13):  # with a seed of 0 the noise is what the latents are
        plain.process_batch(seed=seed)
        loss = stand_in.process_batch(seed=seed)
        before, after = timesteps_of(name, plain.passes[-1]), timesteps_of(name, stand_in.passes[-1])
        for sample, image in enumerate(images):
            least = LEAST.get(image, 0)
            pairs = zip(plain.passes[-1], stand_in.passes[-1], strict=True)
            same = [torch.allclose(one[sample], other[sample], rtol=1e-4, atol=1e-5) for one, other in pairs]
            if before[sample] >= least:
                assert all(same)
            else:
                raised += 1
                assert not any(same[::2])  # its noise, and so a target of noise, stays
                assert after[sample] >= least - 1e-3
        assert loss.isfinite()
    assert raised > 6


DISTRIBUTIONS = {
    "sd15": {},
    "sdxl": {"min_timestep": 300, "max_timestep": 950},
    "sd3": {"weighting_scheme": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0},
    "flux": {"timestep_sampling": "shift", "discrete_flow_shift": 3.0, "sigmoid_scale": 1.0},
    "anima": {"timestep_sampling": "sigmoid", "sigmoid_scale": 1.0},
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_distribution_is_the_trainers_own_above_the_least(stand_ins, name):
    plain, stand_in = (stand_ins.make(name, **DISTRIBUTIONS[name]) for _ in range(2))
    install(stand_in, [BAD] * 3)
    own, above = [], []
    for seed in range(300):
        plain.process_batch(seed=seed)
        own += timesteps_of(name, plain.passes[-1]).tolist()
        stand_in.process_batch(seed=1000 + seed)
        above += timesteps_of(name, stand_in.passes[-1]).tolist()
    expected = [timestep for timestep in own if timestep >= LEAST[BAD]]
    assert min(above) >= LEAST[BAD] - 1e-3
    assert stats.ks_2samp(above, expected).pvalue > 1e-3


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_a_shared_timestep_counts_the_images_that_may_train_there(stand_ins, name):
    stand_in = stand_ins.make(name)
    hook = install(stand_in, [SHARP, BAD, SHARP], dist_match=0.1, timesteps="shared", min_timestep=1, max_timestep=999)
    for seed in range(4):
        base = stand_in.process_batch(seed=seed)
        timesteps = timesteps_of(name, stand_in.passes[-1])
        shared = float(hook.term._plan.shared)
        assert timesteps[0] == timesteps[2] == pytest.approx(shared, abs=1)
        counted = torch.tensor([1.0, float(shared >= LEAST[BAD]), 1.0])
        assert timesteps[1] >= LEAST[BAD] - 1e-3
        metrics = hook.term.settle(seed + 1)
        stand_in.batch["loss_weights"] = counted
        low, high = expected_bands(
            stand_in, (*stand_in.passes[-1][:2], [shared / (1000 if name == "anima" else 1)] * 3)
        )
        stand_in.batch["loss_weights"] = torch.ones(3)
        assert (metrics.low, metrics.high) == pytest.approx((low, high), rel=1e-3)
        assert base.isfinite()


def test_an_extra_pass_counts_the_images_that_may_train_there(stand_ins):
    stand_in = stand_ins.make("sd15")
    hook = install(stand_in, [SHARP, WORSE, BAD], dist_match=0.1, min_timestep=500, max_timestep=700)
    seen = set()
    for seed in range(8):
        stand_in.process_batch(seed=seed)
        extra, base = stand_in.passes
        metrics = hook.term.settle(seed + 1)
        counted = [1.0, 0.0, float(extra[2][0] >= LEAST[BAD])]
        stand_in.batch["loss_weights"] = torch.tensor(counted)
        assert (metrics.low, metrics.high) == pytest.approx(expected_bands(stand_in, extra), rel=1e-4)
        stand_in.batch["loss_weights"] = torch.ones(3)
        assert (timesteps_of("sd15", base) >= torch.tensor([0, LEAST[WORSE], LEAST[BAD]])).all()
        seen.add(counted[2])
    assert seen == {0.0, 1.0}


@pytest.mark.parametrize("sampling", ["sigma", "sigmoid", "shift"])
def test_noise_that_the_trainer_draws_by_itself_stays_what_it_is(stand_ins, sampling):
    """``ip_noise_gamma``: bit for bit for samples that keep their timestep, and in the next batch."""
    settings = {"timestep_sampling": sampling, "ip_noise_gamma": 0.1}
    plain, stand_in = stand_ins.make("flux", **settings), stand_ins.make("flux", **settings)
    images = [BAD, SHARP, WORSE]
    install(stand_in, images)
    for seed in range(1, 9):
        plain.process_batch(seed=seed)
        next_number = torch.rand(1)
        stand_in.process_batch(seed=seed)
        assert torch.equal(torch.rand(1), next_number)
        before, after = plain.passes[-1], stand_in.passes[-1]
        for sample, image in enumerate(images):
            if before[2][sample] >= LEAST.get(image, 0):
                assert all(torch.equal(one[sample], other[sample]) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "logit_normal"])
def test_weights_by_sigma_are_those_of_the_timestep(stand_ins, scheme):
    """FLUX with a reshaped prediction: sd-scripts weighs the loss by the sigma of each sample."""
    settings = {"timestep_sampling": "sigma", "model_prediction_type": "sigma_scaled", "weighting_scheme": scheme}
    stand_in = stand_ins.make("flux", **settings)
    hook = install(stand_in, [SHARP, BAD, WORSE])
    for seed in range(4):
        loss = stand_in.process_batch(seed=seed)
        prediction, target, timesteps = stand_in.passes[-1]
        assert (timesteps >= torch.tensor([0, LEAST[BAD], LEAST[WORSE]]) - 1e-3).all()
        weights = (timesteps / 1000) ** -2 if scheme == "sigma_sqrt" else torch.ones(3)
        shares = hook.term._plan.weights
        expected = ((prediction - target).square().mean(dim=(1, 2, 3)) * weights * shares).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_without_an_image_for_its_term_there_is_no_extra_pass(stand_ins):
    stand_in = stand_ins.make("sd15")
    hook = install(stand_in, [WORSE] * 3, dist_match=0.1)
    stand_in.process_batch()
    assert len(stand_in.passes) == 1
    assert hook.term.settle(1).total == 0


def test_own_timesteps_are_those_after_the_draw(stand_ins):
    stand_in = stand_ins.make("sd15")
    hook = install(stand_in, [SHARP, BAD, WORSE], dist_match=0.1, timesteps="own", min_timestep=0, max_timestep=1000)
    stand_in.process_batch()
    metrics = hook.term.settle(1)
    assert (metrics.low, metrics.high) == pytest.approx(expected_bands(stand_in, stand_in.passes[-1]), rel=1e-4)


def test_balance_and_quality_together(stand_ins):
    stand_in = stand_ins.make("sd15")
    hook = install(stand_in, [SHARP, BAD, WORSE], balance="band", method="fft")
    for seed in range(3):
        assert stand_in.process_batch(seed=seed).isfinite()
        assert timesteps_of("sd15", stand_in.passes[-1])[2] >= LEAST[WORSE]
        assert hook.term.settle(seed + 1) is not None


def test_validation_is_left_alone(stand_ins):
    stand_in = stand_ins.make("sd15")
    plain = stand_in.process_batch(is_train=False)
    install(stand_in, [WORSE] * 3)
    assert torch.equal(stand_in.process_batch(is_train=False), plain)


def test_the_stand_ins_have_the_schedule_that_least_timesteps_assume(stand_ins):
    from freq_loss_plugin.image_quality.noise_schedules import stable_diffusion_alphas

    for name in ("sd15", "sdxl"):
        expected = stand_ins.make(name).scheduler.alphas_cumprod
        torch.testing.assert_close(stable_diffusion_alphas().float(), expected, rtol=1e-5, atol=0)
    assert stable_diffusion_alphas().numpy() == pytest.approx(oracle.stable_diffusion_alphas_cumprod(), rel=1e-6)


def narrow_vae(name):
    """A VAE of the kind that each trainer gives to a network module, with random weights."""
    if name in ("sd15", "sdxl"):
        from diffusers import AutoencoderKL

        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        return AutoencoderKL(block_out_channels=(32,) * 4, **blocks)
    if name == "sd3":
        from library.sd3_models import SDVAE

        return SDVAE()
    if name in ("flux", "lumina"):
        from library.flux_models import AutoEncoder, AutoEncoderParams

        return AutoEncoder(AutoEncoderParams(64, 3, 32, 3, [1, 1, 1, 1], 1, 16, 0.3611, 0.1159))
    from library.qwen_image_autoencoder_kl import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(base_dim=16, num_res_blocks=1)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "hunyuan_image"])  # its VAE has one, large size
def test_images_are_encoded_as_the_trainer_does(stand_ins, name):
    stand_in = stand_ins.make(name)
    torch.manual_seed(1)
    vae = narrow_vae(name).eval()
    if name in ("sd15", "sdxl"):
        stand_in.trainer.vae_scale_factor = 0.5
    encoder = _Encoder(TrainingRun(stand_in.trainer, stand_in.args), vae)
    state = torch.get_rng_state()
    with encoder.restoring():
        latents = [encoder.encode(image) for image in (scene(1), scene(1), enlarged(scene(1), 8))]
    assert latents[0].shape[-2:] == (16, 16)
    assert torch.equal(latents[0], latents[1])
    assert 0 < (latents[2] - latents[0]).square().sum() < float("inf")
    assert latents[0].ndim == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_module_without_a_vae_is_told(stand_ins):
    stand_in = stand_ins.make("sd15")
    encoder = _Encoder(TrainingRun(stand_in.trainer, stand_in.args), None)
    with encoder.restoring(), pytest.raises(ConfigError, match=r"needs the VAE to compare images, and .* NoneType"):
        encoder.encode(scene(1))


def test_a_vae_that_returns_nan_is_told(stand_ins):
    stand_in = stand_ins.make("sd15")
    vae = narrow_vae("sd15")
    torch.nn.init.constant_(vae.encoder.conv_in.weight, float("nan"))
    stand_in.trainer.vae_scale_factor = 0.5
    encoder = _Encoder(TrainingRun(stand_in.trainer, stand_in.args), vae)
    with pytest.raises(ConfigError, match="no_half_vae"):
        encoder.encode(scene(1))
