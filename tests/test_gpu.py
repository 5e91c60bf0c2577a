"""What only a GPU can show: the numbers of the CPU, few launches, and steps that never wait for the device."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from freq_loss_plugin import FreqLossConfig, frequency_matching_loss
from freq_loss_plugin.image_quality.restoration import fit
from freq_loss_plugin.training.passes import Pass
from freq_loss_plugin.training.term import FrequencyTerm
from freq_loss_plugin.training.timesteps import Draws

sys.path.insert(0, str(Path(__file__).parent / "musubi_host"))

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    # What PyTorch says of itself: the first use of cuBLAS, and that the mode below is a prototype.
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*cuBLAS:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*[Ss]ynchronization debug mode:UserWarning"),
]

DEVICE = torch.device("cuda")
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
BATCH = 4


@contextmanager
def no_synchronization():
    """An error wherever the CPU waits for the device."""
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def inputs(device=DEVICE, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(BATCH, 4, 64, 64, generator=generator).to(device, dtype) for _ in range(2))
    return prediction.requires_grad_(), target


def loss_of(prediction, target, spec, timesteps=400):
    """With timesteps of a batch, alpha_bar is where they are."""
    device = timesteps.device if isinstance(timesteps, torch.Tensor) else torch.device("cpu")
    return frequency_matching_loss(
        prediction,
        target,
        prediction_type="epsilon",
        timesteps=timesteps,
        alphas_cumprod=ALPHAS_ON[device.type],
        config=spec,
    )


ALPHAS_ON = {"cpu": ALPHAS}
if torch.cuda.is_available():
    ALPHAS_ON["cuda"] = ALPHAS.to(DEVICE)

CASES = [
    pytest.param(FreqLossConfig(method=method, timesteps=mode).loss_spec, timesteps, id=f"{method}-{mode}")
    for method in ("wavelet", "fft")
    for mode, timesteps in (("unified", 400), ("own", torch.tensor([100, 300, 500, 700])))
]


def on_device(timesteps):
    return timesteps.to(DEVICE) if isinstance(timesteps, torch.Tensor) else timesteps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("spec", "timesteps"), CASES)
def test_the_numbers_are_those_of_the_cpu(spec, timesteps, dtype):
    prediction, target = inputs(dtype=dtype)
    loss = loss_of(prediction, target, spec, on_device(timesteps))
    (gradient,) = torch.autograd.grad(loss.total, prediction)
    on_cpu, target_on_cpu = inputs("cpu", dtype)
    expected = loss_of(on_cpu, target_on_cpu, spec, timesteps)
    (expected_gradient,) = torch.autograd.grad(expected.total, on_cpu)
    for number, expected_number in zip(loss, expected, strict=True):
        torch.testing.assert_close(number.detach().cpu(), expected_number.detach(), rtol=1e-4, atol=0)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    tolerance = rounding * float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=rounding, atol=tolerance)


@pytest.mark.parametrize(("spec", "timesteps"), CASES)
def test_a_few_dozen_launches_without_synchronization(spec, timesteps):
    (prediction, target), timesteps = inputs(), on_device(timesteps)
    loss_of(prediction, target, spec, timesteps).total.backward()  # makes the operators
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with no_synchronization(), torch.profiler.profile(activities=activities) as profile:
        loss_of(prediction, target, spec, timesteps).total.backward()
    launches = sum(event.count for event in profile.key_averages() if event.key in LAUNCHES)
    assert 0 < launches <= 40, [event.key for event in profile.key_averages()]


OPTIONS = [
    {"timesteps": "own"},
    {"timesteps": "own", "gradient_ratio": 0.1},
    {"timesteps": "own", "method": "fft", "min_snr_gamma": 5.0},
    {"timesteps": "shared", "gradient_ratio": 0.1},
    {"timesteps": "unified"},
    {"timesteps": "unified", "gradient_ratio": 0.1},
    {"dist_match": 0.0, "balance": "timestep"},
    {"timesteps": "shared", "gradient_ratio": 0.1, "balance": "band"},
    {"timesteps": "shared", "gradient_ratio": 0.1, "image_quality": "auto"},
    {"timesteps": "own", "image_quality": "auto"},
]
# The least timesteps of the images in a batch with ``image_quality``.
LEAST = torch.tensor([0, 300, 700, 0])


class Steps:
    """Batches as the trainers make them, up to the optimizer step; the model is one weight."""

    def __init__(self, options, dtype):
        config = FreqLossConfig(**options)
        least = Counter(LEAST.tolist()) if config.gated else None
        self.term = FrequencyTerm(config, "epsilon", seed=0, least=least)
        self.weight = torch.full((), 0.9, device=DEVICE, requires_grad=True)
        self.clean, self.noise = (values.detach() for values in inputs(dtype=dtype))
        self.own = torch.arange(100, 900, 200, device=DEVICE)

    def run(self, timesteps):
        return Pass(self.weight * self.clean + self.noise, self.noise, timesteps, ALPHAS_ON[DEVICE.type])

    def step(self):
        least = LEAST if self.term.config.gated else None
        plan = self.term.plan(least)
        if plan.extra is not None:
            self.term.extra_pass(self.run(plan.extra), torch.Tensor.backward)
        timesteps = self.own
        if plan.chooses:
            draws = Draws(self.own, lambda count: torch.tensor([400, 800]).repeat(count)[:count])
            timesteps = self.term.choose(draws).to(DEVICE, non_blocking=True)
        passed = self.run(timesteps)
        balanced = self.term.balance(passed)
        losses = (balanced.prediction.float() - self.noise.float()).square().mean(dim=(1, 2, 3))
        losses = losses if balanced.weights is None else losses * balanced.weights
        loss = self.term.join(passed, losses.mean())
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_never_waits_for_the_device(options, dtype):
    steps = Steps(options, dtype)
    losses = [steps.step()]  # makes the operators, and moves the schedule once
    for number in range(1, 4):
        metrics = steps.term.settle(number)
        assert metrics.logs()["loss/freq_total"] > 0 or "dist_match" in options
        with no_synchronization():
            losses.append(steps.step())
    assert torch.stack(losses).isfinite().all()
    assert steps.weight.grad.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restoring_latents_never_waits_for_the_device(dtype):
    generator = torch.Generator().manual_seed(0)
    sharp = [torch.randn(16, 32, 32, generator=generator) for _ in range(4)]
    fitted = fit(sharp, [0.5 * latents + 1 for latents in sharp])
    latents = torch.randn(16, 48, 64, generator=generator)
    there = latents.to(DEVICE, dtype)
    fitted.apply(there)  # moves the filter
    with no_synchronization():
        restored = fitted.apply(there)
    assert restored.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(restored.float().cpu(), fitted.apply(latents), rtol=tolerance, atol=tolerance)


def drawn_with_least(choose, term, least):
    """What a host's function returns where each image has a least timestep; the first call draws in advance."""
    choose(term, term.plan(least).own_stream)
    with no_synchronization():
        return choose(term, term.plan(least).own_stream)


def given_latents():
    latents, noise = torch.randn(2, BATCH, 16, 32, 32, device=DEVICE)
    return {"latents": latents, "noise": noise, "device": DEVICE, "dtype": torch.bfloat16}


@pytest.mark.sd_scripts
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("sampling", ["uniform", "sigmoid", "shift", "flux_shift"])  # the host itself waits for others
def test_least_timesteps_in_sd_scripts_never_wait_for_the_device(stand_ins, sampling):
    from kohya_patch.sd_scripts import host
    from kohya_patch.sd_scripts.timesteps import TimestepChoice

    stand_in = stand_ins.make("flux", timestep_sampling=sampling)
    drawing = host.drawing_function(type(stand_in.trainer), "flow")
    given = {**given_latents(), "args": stand_in.args, "noise_scheduler": stand_in.scheduler}

    def choose(term, stream):
        with TimestepChoice("flow", drawing).made_by(term.choose, stream):
            return drawing.function(**given)

    term = FrequencyTerm(FreqLossConfig(dist_match=0.0), "flow", seed=0, least=Counter(LEAST.tolist()))
    noisy, timesteps, _ = drawn_with_least(choose, term, LEAST)
    assert (timesteps.float().cpu() >= LEAST - 4).all()  # in bfloat16
    sigma = timesteps.float().view(-1, 1, 1, 1) / 1000
    mixed = (1 - sigma) * given["latents"] + sigma * given["noise"]
    torch.testing.assert_close(noisy.float(), mixed, rtol=0, atol=0.05)


@pytest.mark.musubi_tuner
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("sampling", ["uniform", "sigmoid", "shift", "flux2_shift", "logsnr"])
def test_least_timesteps_in_musubi_tuner_never_wait_for_the_device(sampling):
    import musubi_stand_ins

    from kohya_patch.musubi import timesteps as musubi_timesteps

    stand_in = musubi_stand_ins.make("flux_2", timestep_sampling=sampling)
    given = {**given_latents(), "args": stand_in.args, "timesteps": None, "noise_scheduler": stand_in.scheduler}
    method = stand_in.trainer.get_noisy_model_input_and_timesteps
    term = FrequencyTerm(FreqLossConfig(dist_match=0.0), "flow", seed=0, least=Counter(LEAST.tolist()))

    def choose(term, stream):
        return musubi_timesteps.chosen(method, given, term.choose, stream)

    noisy, returned = drawn_with_least(choose, term, LEAST)
    at = musubi_timesteps.on_scale(returned, stand_in.args)
    assert (at.cpu() >= LEAST - 0.1).all()
    sigma = at.view(-1, 1, 1, 1) / 1000
    torch.testing.assert_close(noisy, (1 - sigma) * given["latents"] + sigma * given["noise"], rtol=0, atol=1e-3)
