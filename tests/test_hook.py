"""The hook on every trainer class of sd-scripts, its real `process_batch` and all, with a stand-in for the denoiser."""

from __future__ import annotations

import argparse
import functools
import random
import weakref

import pytest
import torch
from hooked import NAMES, expected_bands, install, needs_module

import kohya_patch
from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.training.monitor import NonFiniteLossError
from kohya_patch.host import UnsupportedTrainerError
from kohya_patch.sd_scripts import host

# The host's own warnings are none of this project's business.
pytestmark = pytest.mark.filterwarnings("default")


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


def propagate_together(hook):
    """Leave the graph of the extra pass alive; returns the list to which its term is added."""
    terms, extra_pass = [], hook.term.extra_pass
    hook.term.extra_pass = lambda passed, _: extra_pass(passed, terms.append)
    return terms


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_two_backward_passes_add_up_to_the_gradient_of_the_sum(stand_ins, name):
    losses, gradients = {}, {}
    for together in (False, True):
        stand_in = stand_ins.make(name, gradient_accumulation_steps=2)
        stand_in.accelerator.gradient_accumulation_steps = 2
        hook = install(stand_in, FreqLossConfig(dist_match=5.0))
        terms = propagate_together(hook) if together else []
        for _ in range(2):
            loss = stand_in.process_batch()
            losses[together] = loss.item()
            stand_in.accelerator.backward(loss + terms.pop() if together else loss)
        gradients[together] = stand_in.denoiser.mix.grad
    assert losses[False] == losses[True]
    torch.testing.assert_close(gradients[False], gradients[True], rtol=1e-4, atol=1e-6)
    plain = stand_ins.make(name)
    plain.accelerator.backward(plain.process_batch())
    assert not torch.allclose(gradients[False], plain.denoiser.mix.grad, rtol=1e-3)


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
        terms = propagate_together(hook) if together else []
        stand_in.accelerator.backward(sum(terms, stand_in.process_batch()))
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
        terms = propagate_together(hook) if together else []
        kept = SavedBytes()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda kept: kept.tensor):
            stand_in.accelerator.backward(sum(terms, stand_in.process_batch()))
        most[dist_match, together] = kept.most
    assert most[0.1, False] <= 1.05 * most[0.0, False]
    assert most[0.1, True] > 1.9 * most[0.0, False]  # so it can be seen


@pytest.mark.sd_scripts
@pytest.mark.parametrize("name", NAMES)
def test_validation_and_other_runs_are_left_alone(stand_ins, name):
    stand_in = stand_ins.make(name)
    base = stand_in.process_batch(is_train=False)
    install(stand_in, FreqLossConfig(dist_match=0.1))
    assert torch.equal(stand_in.process_batch(is_train=False), base)
    stand_in.args = argparse.Namespace(**vars(stand_in.args))  # the same trainer object, another run
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
    """With masked_loss the mask is the red channel of an image in -1..1, averaged down to the size of the latents."""
    stand_in = stand_ins.make(name, masked_loss=True)
    masks = torch.rand(3, 16, 12)
    images = torch.zeros(3, 3, 128, 96)
    images[:, 0] = masks.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2) * 2 - 1
    stand_in.batch["conditioning_images"] = images
    base = stand_in.process_batch()
    install(stand_in, FreqLossConfig(dist_match=0.1))
    loss = stand_in.process_batch()
    low, high = expected_bands(stand_in, stand_in.passes[0], mask=masks.double().numpy()[:, None])
    assert (loss - base).item() == pytest.approx(0.1 * (0.7 * low + 0.3 * high), rel=1e-4)


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
    # A second run on the same object replaces the first hook instead of stacking on it.
    install(stand_in, FreqLossConfig(dist_match=0.1))
    once = stand_in.process_batch()
    install(stand_in, FreqLossConfig(dist_match=0.1))
    assert torch.equal(stand_in.process_batch(), once)


@pytest.mark.sd_scripts
@pytest.mark.long
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
        numbers = stand_in.trainer._freq_loss_hook.term.settle(1)
        optimizer.step()
        if numbers.total > 0:
            low, high = expected_bands(stand_in, stand_in.passes[0])
            assert numbers.total == pytest.approx(0.1 * (0.7 * low + 0.3 * high), rel=1e-4)
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())
    assert sum(parameter.grad.abs().sum() for parameter in made.parameters()) > 0
    metadata = {}
    stand_in.trainer.update_metadata(metadata, args)
    assert metadata["ss_network_module"] == module
