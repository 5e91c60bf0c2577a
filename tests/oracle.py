"""The formula, written a second time in float64 NumPy and PyWavelets, sharing no code with the package.

Gradients are central differences: the loss is quadratic in the prediction, so they are exact up to rounding.
"""

from __future__ import annotations

import numpy as np
import pywt


def wavelet_bands(array, wavelet="db3", levels=2):
    """(low, high) over the last two axes: the inverse of the approximation alone and of the details alone, cropped."""
    height, width = array.shape[-2:]
    coefficients = pywt.wavedec2(array, wavelet, mode="zero", level=levels, axes=(-2, -1))

    def inverse(approximation, details):
        whole = pywt.waverec2([approximation, *details], wavelet, mode="zero", axes=(-2, -1))
        return whole[..., :height, :width]

    no_details = [tuple(np.zeros_like(part) for part in detail) for detail in coefficients[1:]]
    low = inverse(coefficients[0], no_details)
    high = inverse(np.zeros_like(coefficients[0]), coefficients[1:])
    return low, high


def fft_bands(array, cutoff=0.25):
    """(low, high) with the disc drawn pixel by pixel on the shifted spectrum."""
    height, width = array.shape[-2:]
    radius = int(np.floor(cutoff * min(height, width) + 1e-9))
    disc = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            disc[y, x] = (y - height // 2) ** 2 + (x - width // 2) ** 2 <= radius**2
    spectrum = np.fft.fftshift(np.fft.fft2(array), axes=(-2, -1))
    low = np.fft.ifft2(np.fft.ifftshift(spectrum * disc, axes=(-2, -1))).real
    return low, array - low


def zero_terminal_snr(alphas):
    """alpha_bar rescaled so that the last one is 0 (Lin et al. 2023, algorithm 1)."""
    roots = alphas**0.5
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


def clean_latent(output, noisy, alpha_bar, sigma, prediction_type):
    """x0_hat; v-prediction is turned into epsilon first, where the package solves for x0 directly."""
    if prediction_type == "sample":
        return output
    if prediction_type == "flow":
        return noisy - sigma * output
    signal, noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    epsilon = output if prediction_type == "epsilon" else signal * output + noise * noisy
    return (noisy - noise * epsilon) / signal


def loss(
    prediction, target, noisy, *, prediction_type, timesteps, alphas_cumprod, weights, bands, mask=None, mean=False
):
    """(L_low, L_high) by recovering 2B latents, splitting each, summing and comparing."""
    low = high = 0.0
    for i, t in enumerate(timesteps):
        pair = []
        for output in (prediction[i], target[i]):
            clean = clean_latent(output, noisy[i], alphas_cumprod[int(t)], t / 1000, prediction_type)
            pair.append(bands(clean if mask is None else clean * mask[i]))
        low = low + weights[i] * (pair[0][0] - pair[1][0])
        high = high + weights[i] * (pair[0][1] - pair[1][1])
    if mean:
        low, high = low / len(timesteps), high / len(timesteps)
    return float(np.mean(low**2)), float(np.mean(high**2))


def gradient(function, array, indices, step=1e-2):
    """Central differences of ``function`` at some entries of ``array``. A large step is right for a quadratic."""
    found = []
    for index in indices:
        plus, minus = array.copy(), array.copy()
        plus[index] += step
        minus[index] -= step
        found.append((function(plus) - function(minus)) / (2 * step))
    return np.array(found)


def stable_diffusion_alphas_cumprod():
    """alpha_bar of SD1.5: betas linear in their square roots from 0.00085 to 0.012."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1 - betas)
