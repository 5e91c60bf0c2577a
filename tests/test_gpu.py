"""What only a GPU can show: launches counted by the profiler, no synchronisation, CUDA graphs, and the same numbers."""

from __future__ import annotations

import pytest
import torch

from freq_loss_plugin import FreqLossConfig, frequency_matching_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

DEVICE = torch.device("cuda")
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def inputs(shape=(4, 4, 64, 64)):
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(2))
    return prediction.requires_grad_(), target


def loss_of(prediction, target, config, timesteps=400):
    on_device = isinstance(timesteps, torch.Tensor)
    return frequency_matching_loss(
        prediction,
        target,
        prediction_type="epsilon",
        timesteps=timesteps,
        alphas_cumprod=_alphas_on_device() if on_device else ALPHAS,
        config=config,
    )


_kept: list[torch.Tensor] = []


def _alphas_on_device():
    if not _kept:
        _kept.append(ALPHAS.to(DEVICE))
    return _kept[0]


CASES = [
    pytest.param(FreqLossConfig(method=method, timesteps=mode), timesteps, id=f"{method}-{mode}")
    for method in ("wavelet", "fft")
    for mode, timesteps in (("unified", 400), ("own", torch.tensor([100, 300, 500, 700])))
]


def on_device(timesteps):
    return timesteps.to(DEVICE) if isinstance(timesteps, torch.Tensor) else timesteps


@pytest.mark.parametrize(("config", "timesteps"), CASES)
def test_the_numbers_are_those_of_the_cpu(config, timesteps):
    prediction, target = inputs()
    found = loss_of(prediction, target, config, on_device(timesteps))
    (gradient,) = torch.autograd.grad(found.total, prediction)
    leaf = prediction.detach().cpu().requires_grad_()
    expected = frequency_matching_loss(
        leaf, target.cpu(), prediction_type="epsilon", timesteps=timesteps, alphas_cumprod=ALPHAS, config=config
    )
    (expected_gradient,) = torch.autograd.grad(expected.total, leaf)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient.cpu(), expected_gradient, rtol=1e-4, atol=1e-5 * expected_gradient.abs().max())


@pytest.mark.parametrize(("config", "timesteps"), CASES)
def test_at_most_twelve_launches_and_no_synchronisation(config, timesteps):
    (prediction, target), timesteps = inputs(), on_device(timesteps)
    loss_of(prediction, target, config, timesteps).total.backward()
    prediction.grad = None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            loss_of(prediction, target, config, timesteps).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    launches = sum(event.count for event in profile.key_averages() if event.key in LAUNCHES)
    kernels = [event.key for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < launches <= 12, kernels


@pytest.mark.parametrize(("config", "timesteps"), CASES)
def test_a_cuda_graph_takes_it(config, timesteps):
    (prediction, target), timesteps = inputs(), on_device(timesteps)
    expected = torch.autograd.grad(loss_of(prediction, target, config, timesteps).total, prediction)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(loss_of(prediction, target, config, timesteps).total, prediction)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (gradient,) = torch.autograd.grad(loss_of(prediction, target, config, timesteps).total, prediction)
    gradient.zero_()
    graph.replay()
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("method", ["wavelet", "fft"])
def test_the_compiler_takes_it_whole(method):
    prediction, target = inputs()
    config = FreqLossConfig(method=method)
    compiled = torch.compile(lambda prediction: loss_of(prediction, target, config).total, fullgraph=True)
    found = torch.autograd.grad(compiled(prediction), prediction)
    torch.testing.assert_close(found, torch.autograd.grad(loss_of(prediction, target, config).total, prediction))
