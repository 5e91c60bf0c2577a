"""The folded loss: value and gradient against an independent float64 implementation, and the facts it rests on."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import autocast
from torch.utils._python_dispatch import TorchDispatchMode

from freq_loss_plugin import FreqLossConfig, LossSpec, frequency_matching_loss, reference_loss
from freq_loss_plugin.loss.latents import PREDICTION_TYPES
from freq_loss_plugin.loss.matching import band_error_maps

ALPHAS = oracle.stable_diffusion_alphas_cumprod()
ALPHAS32 = torch.from_numpy(ALPHAS).float()


def batch(shape, seed=0):
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(shape) for _ in range(3))


def oracle_bands(config):
    if config.method == "fft":
        return lambda x: oracle.fft_bands(x, config.cutoff)
    return lambda x: oracle.wavelet_bands(x, config.wavelet, config.levels)


def check(config, shape, prediction_type, timesteps, *, weights=None, mask=None, tolerance=1e-5):
    """Value and gradient of the float32 folded loss against the float64 oracle, relative error below ``tolerance``."""
    prediction, target, noisy = (x.astype(np.float32).astype(np.float64) for x in batch(shape))

    def expected(array):
        low, high = oracle.loss(
            array,
            target,
            noisy,
            prediction_type=prediction_type,
            timesteps=timesteps,
            alphas_cumprod=ALPHAS32.double().numpy(),
            weights=np.ones(shape[0]) if weights is None else weights,
            bands=oracle_bands(config),
            mask=mask,
            mean=config.reduction == "mean",
        )
        return low, high, config.dist_match * (config.low_weight * low + config.high_weight * high)

    tensor = torch.from_numpy(prediction).float().requires_grad_()
    found = frequency_matching_loss(
        tensor,
        torch.from_numpy(target).float(),
        prediction_type=prediction_type,
        timesteps=torch.tensor(timesteps),
        alphas_cumprod=ALPHAS32,
        sample_weights=None if weights is None else torch.tensor(weights, dtype=torch.float32),
        mask=None if mask is None else torch.from_numpy(mask).float(),
        config=config,
    )
    low, high, total = expected(prediction)
    np.testing.assert_allclose([found.low.item(), found.high.item(), found.total.item()], [low, high, total], tolerance)

    (gradient,) = torch.autograd.grad(found.total, tensor)
    chosen = np.random.default_rng(1).choice(prediction.size, size=min(6, prediction.size), replace=False)
    indices = [np.unravel_index(i, shape) for i in chosen]
    numeric = oracle.gradient(lambda array: expected(array)[2], prediction, indices)
    error = np.abs(numeric - [gradient[index].item() for index in indices]).max()
    assert error <= tolerance * gradient.abs().max().item()


@pytest.mark.parametrize("method", ["wavelet", "fft"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (4, 4, 33, 20), (3, 2, 4, 7), (2, 16, 64, 64)], ids=str)
def test_equals_the_formula(shape, prediction_type, method):
    timesteps = [250, 400, 1, 599][: shape[0]]
    check(FreqLossConfig(method=method, dist_match=0.5), shape, prediction_type, timesteps)


@pytest.mark.parametrize("method", ["wavelet", "fft"])
@pytest.mark.parametrize("size", [(2, 2), (2, 9), (3, 3), (5, 128), (256, 256)], ids=str)
def test_equals_the_formula_at_extreme_sizes(size, method):
    check(FreqLossConfig(method=method, levels=1), (2, 1, *size), "epsilon", [300, 500])


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("wavelet", ["db1", "db3", "sym5", "bior2.4", "coif2", "db20"])
def test_equals_the_formula_for_every_wavelet_and_depth(wavelet, levels):
    check(FreqLossConfig(wavelet=wavelet, levels=levels), (2, 2, 17, 24), "v_prediction", [300, 500])


@pytest.mark.parametrize("method", ["wavelet", "fft"])
def test_weights_mask_reduction_and_band_weights(method):
    config = FreqLossConfig(
        method=method, low_weight=0.2, high_weight=1.5, reduction="mean", dist_match=2.0, cutoff=0.4, wavelet="haar"
    )
    mask = np.random.default_rng(5).uniform(size=(3, 1, 12, 10)).astype(np.float32).astype(np.float64)
    check(config, (3, 4, 12, 10), "epsilon", [300, 10, 990], weights=[1.0, 0.25, 0.0], mask=mask)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(4, 40),
    width=st.integers(4, 40),
    samples=st.integers(1, 5),
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    method=st.sampled_from(["wavelet", "fft"]),
    timestep=st.integers(1, 999),
    reduction=st.sampled_from(["sum", "mean"]),
)
def test_folded_and_reference_agree(height, width, samples, prediction_type, method, timestep, reduction):
    prediction, target, noisy = (torch.from_numpy(x) for x in batch((samples, 3, height, width), timestep))
    common = {
        "prediction_type": prediction_type,
        "timesteps": timestep,
        "alphas_cumprod": torch.from_numpy(ALPHAS),
        "sample_weights": torch.rand(samples, dtype=torch.float64),
        "config": FreqLossConfig(method=method, reduction=reduction),
    }
    folded = frequency_matching_loss(prediction, target, **common)
    reference = reference_loss(prediction, target, noisy_latents=noisy, **common)
    for left, right in zip(folded, reference, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-7, atol=0)


def test_a_single_timestep_may_be_a_number_or_a_tensor_of_any_shape():
    prediction, target, noisy = torch.randn(3, 4, 4, 8, 8)
    common = {"prediction_type": "epsilon", "alphas_cumprod": ALPHAS32, "config": FreqLossConfig()}
    expected = frequency_matching_loss(prediction, target, timesteps=torch.full((4,), 321), **common)
    for timesteps in (321, torch.tensor(321), torch.tensor([321])):
        found = frequency_matching_loss(prediction, target, timesteps=timesteps, **common)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            reference_loss(prediction, target, noisy_latents=noisy, timesteps=timesteps, **common),
            expected,
            rtol=1e-4,
            atol=0,
        )


def test_video_latents_equal_frames_as_channels():
    video, target = torch.randn(2, 2, 4, 3, 12, 12)
    arguments = {"prediction_type": "flow", "timesteps": 500, "config": FreqLossConfig()}
    as_video = frequency_matching_loss(video, target, **arguments)
    as_channels = frequency_matching_loss(video.flatten(1, 2), target.flatten(1, 2), **arguments)
    torch.testing.assert_close(as_video.total, as_channels.total)


@pytest.mark.parametrize("method", ["wavelet", "fft"])
def test_gradcheck(method):
    prediction, target = torch.randn(2, 2, 2, 5, 6, dtype=torch.float64)
    config = FreqLossConfig(method=method, dist_match=1.0)
    assert torch.autograd.gradcheck(
        lambda x: frequency_matching_loss(x, target, prediction_type="flow", timesteps=400, config=config).total,
        (prediction.requires_grad_(),),
    )


def test_equal_weights_with_fft_are_the_plain_mse_of_the_batch_sum():
    prediction, target = torch.randn(2, 4, 4, 16, 16)
    config = FreqLossConfig(method="fft", low_weight=1, high_weight=1, dist_match=1)
    total = frequency_matching_loss(prediction, target, prediction_type="sample", timesteps=None, config=config).total
    torch.testing.assert_close(total, (prediction.sum(0) - target.sum(0)).square().mean())


def test_own_counts_only_samples_inside_the_window_even_where_epsilon_is_undefined():
    alphas = ALPHAS32.clone()
    alphas[-1] = 0
    prediction, target = torch.randn(2, 4, 4, 16, 16)
    prediction.requires_grad_()
    common = {"prediction_type": "epsilon", "alphas_cumprod": alphas}
    own = FreqLossConfig(timesteps="own", min_timestep=200, max_timestep=600)
    found = frequency_matching_loss(
        prediction, target, timesteps=torch.tensor([200, 600, 999, 599]), config=own, **common
    )
    inside = frequency_matching_loss(
        prediction[[0, 3]], target[[0, 3]], timesteps=torch.tensor([200, 599]), config=FreqLossConfig(), **common
    )
    torch.testing.assert_close(found, inside)
    (gradient,) = torch.autograd.grad(found.total, prediction)
    assert gradient.isfinite().all()
    assert gradient[1:3].abs().sum() == 0
    assert gradient[0].abs().sum() > 0


def test_min_snr_weights_are_those_of_sd_scripts():
    prediction, target = torch.randn(2, 3, 4, 16, 16)
    timesteps = torch.tensor([5, 150, 800])
    snr = ALPHAS[timesteps] / (1 - ALPHAS[timesteps])
    expected = {"epsilon": np.minimum(snr, 3) / snr, "v_prediction": np.minimum(snr, 3) / (snr + 1)}
    for prediction_type, weights in expected.items():
        common = {"prediction_type": prediction_type, "timesteps": timesteps, "alphas_cumprod": ALPHAS32}
        config = FreqLossConfig(sample_weights="min_snr", min_snr_gamma=3.0)
        found = frequency_matching_loss(prediction, target, config=config, **common)
        explicit = frequency_matching_loss(
            prediction, target, sample_weights=torch.tensor(weights), config=FreqLossConfig(), **common
        )
        torch.testing.assert_close(found, explicit)
    with pytest.raises(ValueError, match=r"Min-SNR.*'flow'"):
        frequency_matching_loss(
            prediction,
            target,
            prediction_type="flow",
            timesteps=timesteps,
            config=FreqLossConfig(sample_weights="min_snr"),
        )


def test_mean_does_not_grow_with_the_batch_and_sum_does():
    prediction, target = torch.randn(2, 2, 4, 16, 16)
    twice = prediction.repeat(2, 1, 1, 1), target.repeat(2, 1, 1, 1)
    arguments = {"prediction_type": "sample", "timesteps": None}
    for reduction, factor in (("mean", 1), ("sum", 4)):
        config = FreqLossConfig(reduction=reduction)
        once = frequency_matching_loss(prediction, target, config=config, **arguments).total
        torch.testing.assert_close(
            frequency_matching_loss(*twice, config=config, **arguments).total, factor * once, rtol=1e-5, atol=0
        )


def test_the_total_is_dist_match_times_the_weighted_bands_and_zero_is_zero():
    prediction, target = torch.randn(2, 2, 4, 16, 16)
    prediction.requires_grad_()
    arguments = {"prediction_type": "sample", "timesteps": None}
    found = frequency_matching_loss(prediction, target, config=FreqLossConfig(dist_match=0.01), **arguments)
    torch.testing.assert_close(found.total, 0.01 * (0.7 * found.low + 0.3 * found.high))
    off = frequency_matching_loss(prediction, target, config=FreqLossConfig(dist_match=0), **arguments)
    (gradient,) = torch.autograd.grad(off.total, prediction)
    assert off.total == 0
    assert gradient.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32_whatever_the_autocast(dtype):
    prediction, target = torch.randn(2, 4, 4, 32, 32).to(dtype)
    arguments = {"prediction_type": "epsilon", "timesteps": 500, "alphas_cumprod": ALPHAS32, "config": FreqLossConfig()}
    with autocast("cpu", dtype=torch.bfloat16):
        inside = frequency_matching_loss(prediction, target, **arguments)
    outside = frequency_matching_loss(prediction.float(), target.float(), **arguments)
    assert inside.total.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=1e-6, atol=0)


class _Operations(TorchDispatchMode):
    """Notes every operation that reaches the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names.append(str(function))
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("timesteps", [400, torch.tensor([100, 300, 500, 700])], ids=["one", "own"])
@pytest.mark.parametrize("method", ["wavelet", "fft"])
def test_never_asks_the_device_for_a_value(method, timesteps):
    prediction, target = torch.randn(2, 4, 4, 16, 16)
    prediction.requires_grad_()
    config = FreqLossConfig(method=method, timesteps="own", sample_weights="min_snr")
    weights, mask = torch.rand(4), torch.rand(4, 1, 16, 16)

    def step():
        frequency_matching_loss(
            prediction,
            target,
            prediction_type="epsilon",
            timesteps=timesteps,
            alphas_cumprod=ALPHAS32,
            sample_weights=weights,
            mask=mask,
            config=config,
        ).total.backward()

    step()  # makes the cached operators
    with _Operations() as operations:
        step()
    # Reading one entry of a schedule that lies on the CPU is no wait for a device; everything else would be.
    waits = [name for name in operations.names if "_local_scalar_dense" in name or "nonzero" in name]
    assert len(waits) <= (0 if isinstance(timesteps, torch.Tensor) else 3), operations.names


def test_errors_name_what_was_received():
    x, config = torch.zeros(2, 4, 8, 8), FreqLossConfig()
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 8\).*\(2, 4, 8, 4\)"):
        frequency_matching_loss(x, x[..., :4], prediction_type="sample", timesteps=None, config=config)
    with pytest.raises(ValueError, match="alphas_cumprod"):
        frequency_matching_loss(x, x, prediction_type="epsilon", timesteps=3, config=config)
    with pytest.raises(ValueError, match=r"levels = 4.*16 × 16.*8 × 8.*set levels = 3"):
        frequency_matching_loss(x, x, prediction_type="sample", timesteps=None, config=FreqLossConfig(levels=4))
    with pytest.raises(ValueError, match=r"sample_weights has shape \(3,\).*2 samples"):
        frequency_matching_loss(
            x, x, prediction_type="sample", timesteps=None, sample_weights=torch.ones(3), config=config
        )
    with pytest.raises(TypeError, match="int64"):
        frequency_matching_loss(x.long(), x, prediction_type="sample", timesteps=None, config=config)


@pytest.mark.parametrize("shape", [(2, 4, 16, 24), (2, 4, 3, 16, 24)], ids=["latents", "video"])
@pytest.mark.parametrize("method", ["wavelet", "fft"])
def test_error_maps_average_to_the_losses_of_their_bands(method, shape):
    prediction, target = torch.randn(shape), torch.randn(shape)
    config = FreqLossConfig(method=method)
    loss = frequency_matching_loss(prediction, target, prediction_type="sample", timesteps=None, config=config)
    maps = band_error_maps((prediction - target).sum(dim=0), config.bands)
    assert maps.low.shape == maps.high.shape == (16, 24)
    torch.testing.assert_close(maps.low.mean(), loss.low, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps.high.mean(), loss.high, atol=1e-5, rtol=1e-4)


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_a_schedule_rescaled_in_place_is_noticed():
    prediction, target = torch.randn(2, 4, 4, 16, 16)
    schedule, timesteps = ALPHAS32.clone(), torch.tensor([100, 300, 500, 700])

    def value():
        return frequency_matching_loss(
            prediction,
            target,
            prediction_type="epsilon",
            timesteps=timesteps,
            alphas_cumprod=schedule,
            config=FreqLossConfig(timesteps="own"),
        ).total

    before = value()
    schedule.mul_(0.5)
    torch.testing.assert_close(value(), reference(prediction, target, timesteps, schedule))
    assert not torch.isclose(value(), before)


def reference(prediction, target, timesteps, schedule):
    config = FreqLossConfig(timesteps="own")
    arguments = {"prediction_type": "epsilon", "timesteps": timesteps, "alphas_cumprod": schedule, "config": config}
    return reference_loss(prediction, target, noisy_latents=torch.zeros_like(target), **arguments).total


class Allocations(TorchDispatchMode):
    """The sizes, in elements, of all tensors that operations make; views are none."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.sizes.append(tensor.numel())
        return made


@pytest.mark.parametrize("timesteps", ["own", "unified"])
@pytest.mark.parametrize("method", ["wavelet", "fft"])
def test_only_the_gradient_is_as_large_as_the_batch(method, timesteps):
    prediction, target = torch.randn(2, 8, 4, 32, 32)
    prediction.requires_grad_()
    config = FreqLossConfig(method=method, timesteps=timesteps)
    t = torch.randint(0, 1000, (8,)) if timesteps == "own" else 400
    with Allocations() as made:
        loss = frequency_matching_loss(
            prediction, target, prediction_type="epsilon", timesteps=t, alphas_cumprod=ALPHAS32, config=config
        )
        loss.total.backward()
    batch, one = prediction.numel(), prediction[0].numel()
    assert sum(size > 2 * one for size in made.sizes) == 1  # a spectrum counts twice: real and imaginary
    assert max(made.sizes) == batch


@pytest.mark.parametrize(("name", "value"), [("reduction", "max"), ("sample_weighting", "snr"), ("dist_match", -1.0)])
def test_a_loss_spec_checks_its_values(name, value):
    with pytest.raises(ValueError, match=f"{name} = {value!r}: expected"):
        LossSpec(**{name: value})
