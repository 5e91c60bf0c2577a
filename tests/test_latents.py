"""Recovering clean latents: the exact target must give the clean latent."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch

from freq_loss_plugin import recover_latent
from freq_loss_plugin.loss.latents import PREDICTION_TYPES, residual_scale

ALPHAS = torch.from_numpy(oracle.stable_diffusion_alphas_cumprod())
TIMESTEPS = torch.tensor([0, 200, 599, 999])


def noised(prediction_type, alphas=ALPHAS, timesteps=TIMESTEPS):
    """Clean latents, x_t, and the perfect prediction."""
    clean, noise = torch.randn(2, len(timesteps), 4, 8, 6, dtype=torch.float64)
    if prediction_type == "flow":
        sigma = (timesteps.double() / 1000).view(-1, 1, 1, 1)
        return clean, (1 - sigma) * clean + sigma * noise, noise - clean
    signal = alphas[timesteps].sqrt().view(-1, 1, 1, 1)
    spread = (1 - alphas[timesteps]).sqrt().view(-1, 1, 1, 1)
    perfect = {"epsilon": noise, "v_prediction": signal * noise - spread * clean, "sample": clean}[prediction_type]
    return clean, signal * clean + spread * noise, perfect


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_gives_the_clean_latent(prediction_type):
    clean, noisy, perfect = noised(prediction_type)
    recovered = recover_latent(perfect, noisy, TIMESTEPS, ALPHAS, prediction_type)
    tolerance = 1e-6 if prediction_type == "flow" else 1e-9  # whole timesteps become a float32 s
    torch.testing.assert_close(recovered, clean, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_residual_scale_is_the_slope_of_recover_latent(prediction_type):
    _, noisy, perfect = noised(prediction_type)
    error = torch.randn_like(perfect)
    moved = recover_latent(perfect + error, noisy, TIMESTEPS, ALPHAS, prediction_type)
    still = recover_latent(perfect, noisy, TIMESTEPS, ALPHAS, prediction_type)
    scale = torch.as_tensor(residual_scale(prediction_type, TIMESTEPS, ALPHAS)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(moved - still, scale * error, atol=1e-9, rtol=1e-9)


def test_v_prediction_is_finite_at_zero_terminal_snr_and_epsilon_is_not():
    alphas = ALPHAS.clone()
    alphas[-1] = 0
    last = torch.tensor([999])
    clean, noisy, perfect = noised("v_prediction", alphas, last)
    torch.testing.assert_close(recover_latent(perfect, noisy, last, alphas, "v_prediction"), clean)
    assert not recover_latent(noisy * 1.1, noisy, last, alphas, "epsilon").isfinite().any()


def test_v_prediction_equals_the_detour_through_epsilon():
    _, noisy, _ = noised("epsilon")
    velocity = torch.randn_like(noisy)
    for i, t in enumerate(TIMESTEPS.tolist()):
        expected = oracle.clean_latent(
            velocity[i].numpy(), noisy[i].numpy(), ALPHAS[t].item(), t / 1000, "v_prediction"
        )
        recovered = recover_latent(velocity[i : i + 1], noisy[i : i + 1], t, ALPHAS, "v_prediction")[0]
        np.testing.assert_allclose(recovered.numpy(), expected, rtol=1e-9, atol=1e-9)


def test_exact_sigmas_take_precedence_over_rounded_timesteps():
    clean, noisy, perfect = noised("flow")
    rounded = TIMESTEPS.to(torch.bfloat16)
    sigmas = TIMESTEPS.double() / 1000
    exact = recover_latent(perfect, noisy, rounded, None, "flow", sigmas=sigmas.view(-1, 1, 1, 1))
    torch.testing.assert_close(exact, clean, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(recover_latent(perfect, noisy, rounded, None, "flow"), clean, atol=1e-6)


def test_a_scalar_timestep_equals_the_same_timestep_for_every_sample():
    for prediction_type in PREDICTION_TYPES:
        clean, noisy, perfect = noised(prediction_type)
        one = recover_latent(perfect, noisy, 345, ALPHAS, prediction_type)
        per_sample = recover_latent(perfect, noisy, torch.full((4,), 345), ALPHAS, prediction_type)
        torch.testing.assert_close(one, per_sample)
        assert clean.shape == one.shape


def test_errors_say_what_is_missing():
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"alphas_cumprod.*noise_scheduler"):
        recover_latent(x, x, 3, None, "epsilon")
    with pytest.raises(ValueError, match=r"'eps'.*'epsilon'"):
        recover_latent(x, x, 3, ALPHAS, "eps")
    with pytest.raises(ValueError, match="timesteps or sigmas"):
        residual_scale("flow", None)
