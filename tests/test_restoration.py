"""Latents restored by a filter: what is left of a defect on images it was not fitted to, and the floor of that."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from bad_images import scene
from diffusers import AutoencoderKL

from freq_loss_plugin.image_quality.defects import Defect
from freq_loss_plugin.image_quality.noise_schedules import signal_to_noise
from freq_loss_plugin.image_quality.pixels import as_pixels
from freq_loss_plugin.image_quality.restoration import RIDGES, RINGS, fit, least_timestep, ring_of
from freq_loss_plugin.toy_model import model_folder

SNR = signal_to_noise("flow")
DEFECTS = [Defect(resolution=0.25), Defect(resolution=0.5), Defect(jpeg=10), Defect(noise=20.0)]


@pytest.fixture(scope="module")
def encoded():
    """For each defect the latents of scenes without it and with it, by the toy model's VAE."""
    vae = AutoencoderKL.from_pretrained(model_folder(), subfolder="vae")
    images = [scene(number, style) for number, style in enumerate(("base", "weave", "frames") * 5)]

    @torch.no_grad()
    def encode(image):
        return vae.encode(as_pixels(image)[None] * 2 - 1).latent_dist.mean[0] * vae.config.scaling_factor

    sharp = [encode(image) for image in images]
    return {defect: (sharp, [encode(defect.apply(image)) for image in images]) for defect in DEFECTS}


def square(tensors):
    return sum(float(tensor.square().sum()) for tensor in tensors)


@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_what_is_left_of_a_defect_on_other_images_is_what_was_promised(encoded, defect):
    sharp, bad = encoded[defect]
    filtered = fit(sharp[:9], bad[:9])
    before = square(one - other for one, other in zip(bad[9:], sharp[9:], strict=True))
    after = square(filtered.apply(one) - other for one, other in zip(bad[9:], sharp[9:], strict=True))
    assert after < before
    assert 1 - after / before == pytest.approx(filtered.restored, abs=0.1)


def random_latents(count, size, channels=3):
    generator = torch.Generator().manual_seed(sum(size) + count)
    return list(torch.randn(count, channels, *size, generator=generator))


def test_a_linear_defect_is_undone_at_any_size():
    """Channels mixed by other matrices at low and at high frequencies, and moved: by hand and in another size."""
    low, high = torch.tensor([[1.0, 0.4, 0.0], [0.0, 0.8, 0.1], [0.2, 0.0, 0.7]]), 0.3 * torch.eye(3)

    def damage(latents):
        rings = ring_of(*latents.shape[-2:])
        spectrum = torch.fft.rfft2(latents)
        matrices = torch.where((rings < 6)[..., None, None], low, high).to(spectrum)
        spectrum = torch.einsum("hwij,jhw->ihw", matrices, spectrum)
        return torch.fft.irfft2(spectrum, s=latents.shape[-2:]) + torch.tensor([0.5, 0.0, -1.0])[:, None, None]

    sharp = random_latents(12, (24, 32))
    filtered = fit(sharp, [damage(one) for one in sharp])
    assert filtered.ridge == RIDGES[0]
    for size in ((24, 32), (33, 17)):
        other = random_latents(1, size)[0]
        left = filtered.apply(damage(other)) - other
        assert square([left]) < 0.02 * square([damage(other) - other])


def test_nothing_is_changed_where_references_say_nothing():
    """No defect, and one that is different noise each time and as strong as the signal is weak."""
    sharp = random_latents(4, (16, 16))
    same = fit(sharp, sharp)
    assert same.error_before.abs().max() == 0
    torch.testing.assert_close(same.apply(sharp[0]), sharp[0], rtol=1e-5, atol=1e-5)
    assert least_timestep(same.error, same.sharp, SNR, 0.05) == 0
    unrelated = fit(random_latents(3, (16, 16), 8), random_latents(2, (16, 16), 8) + random_latents(1, (16, 16), 8))
    assert unrelated.ridge > 0.1


def test_batches_videos_dtypes_and_flips(encoded):
    sharp, bad = encoded[DEFECTS[0]]
    filtered = fit(sharp[:6], bad[:6])
    one = filtered.apply(bad[7])
    torch.testing.assert_close(filtered.apply(torch.stack(bad[7:9]))[0], one)
    frames = torch.stack(bad[7:9]).unsqueeze(0)  # (B, T, C, H, W)
    torch.testing.assert_close(filtered.apply(frames)[0, 0], one)
    half = filtered.apply(bad[7].bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), one, rtol=0.02, atol=0.05)
    torch.testing.assert_close(filtered.apply(bad[7].flip(-1)), one.flip(-1), rtol=1e-4, atol=1e-4)


def test_the_floor_is_the_formula_and_falls_with_the_error_and_the_fraction():
    generator = np.random.default_rng(0)

    def covariance(scale):
        roots = generator.standard_normal((RINGS + 2, 3, 3))
        return scale * np.einsum("rij,rkj->rik", roots, roots)

    sharp, error = covariance(1.0), covariance(0.05)
    counts = np.zeros(RINGS + 2)
    for row in range(64):
        for column in range(64):
            f = math.hypot(min(row, 64 - row), min(column, 64 - column)) / 64
            counts[0 if row == column == 0 else min(int(f * 2 * RINGS), RINGS) + 1] += 1
    ratios = []
    for q in SNR.numpy():
        gains = sharp @ np.linalg.inv(sharp + np.eye(3) / q)
        bias = (np.einsum("rij,rjk,rik->r", gains, error, gains) * counts).sum()
        left = (np.trace(sharp @ np.linalg.inv(np.eye(3) + q * sharp), axis1=1, axis2=2) * counts).sum()
        ratios.append(bias / left)
    for fraction in (0.02, 0.05, 0.2):
        expected = max(np.flatnonzero(np.array(ratios) >= fraction), default=-1) + 1
        tensors = torch.from_numpy(error), torch.from_numpy(sharp)
        assert least_timestep(*tensors, SNR, fraction) == pytest.approx(expected, abs=1)
        assert least_timestep(tensors[0] / 4, tensors[1], SNR, fraction) < expected
    floors = [least_timestep(*tensors, SNR, fraction) for fraction in (0.02, 0.05, 0.2)]
    assert floors == sorted(floors, reverse=True)


def test_a_single_reference_or_a_defect_without_a_pattern_leaves_latents_alone():
    """And the floor is that of the whole defect."""
    one, two, three = random_latents(3, (8, 8))
    for filtered in (fit([one], [two]), fit([one, two], [one + 1, two - 1])):
        assert filtered.restored == 0
        torch.testing.assert_close(filtered.error, filtered.error_before)
        torch.testing.assert_close(filtered.apply(three), three)
        expected = least_timestep(filtered.error_before, filtered.sharp, SNR, 0.05, filtered.counts)
        assert filtered.least_timestep(SNR, 0.05) == expected > 0


def test_no_reference_or_unequal_shapes_are_refused():
    one, two = random_latents(2, (8, 8))
    with pytest.raises(ValueError, match="equal shapes"):
        fit([], [])
    with pytest.raises(ValueError, match="equal shapes"):
        fit([one, two], [one, two[:, :4]])
