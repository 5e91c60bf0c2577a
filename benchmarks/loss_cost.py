"""What the loss costs: forward and backward on latents, side by side with plain MSE, in one run.

    python benchmarks/loss_cost.py [--device cuda] [--repeats 50]

The arms take turns in changing order, so that a machine whose speed drifts hurts them alike; the table shows medians as
multiples of `F.mse_loss` forward and backward on the same tensors.

- mse            F.mse_loss
- formula, …     spec'd as written: recover 2B latents, decompose each with the usual library, sum, compare; the wavelet
                 by pytorch_wavelets' DWTForward and DWTInverse (made once), the FFT by fftshift and a disc
- ours, …        `freq_loss_plugin.frequency_matching_loss`
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from freq_loss_plugin import FreqLossConfig, frequency_matching_loss, wavelet_library

SHAPES = [(4, 4, 64, 64), (4, 4, 128, 128), (32, 4, 64, 64), (4, 16, 256, 256)]
TIMESTEP = 400


def schedule() -> Tensor:
    """alpha_bar of SD1.5."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)


def formula(split: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss as the formula is written, with ``split`` for the bands."""
    alpha_bar = schedule()[TIMESTEP].item()
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5

    def loss(prediction: Tensor, target: Tensor, noisy: Tensor) -> Tensor:
        predicted_low, predicted_high = split((noisy - noise * prediction) / signal)
        clean_low, clean_high = split((noisy - noise * target) / signal)
        low = F.mse_loss(predicted_low.sum(0), clean_low.sum(0))
        high = F.mse_loss(predicted_high.sum(0), clean_high.sum(0))
        return 0.003 * (0.7 * low + 0.3 * high)

    return loss


def library_wavelet(device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    library = wavelet_library.load()
    forward = library.DWTForward(J=2, wave="db3", mode="zero").to(device)
    inverse = library.DWTInverse(wave="db3", mode="zero").to(device)

    def split(latents: Tensor) -> tuple[Tensor, Tensor]:
        approximation, details = forward(latents)
        low = inverse((approximation, [torch.zeros_like(detail) for detail in details]))
        return low, inverse((torch.zeros_like(approximation), details))

    return split


def shifted_fft(latents: Tensor) -> tuple[Tensor, Tensor]:
    height, width = latents.shape[-2:]
    rows = torch.arange(height, device=latents.device)[:, None] - height // 2
    columns = torch.arange(width, device=latents.device)[None, :] - width // 2
    disc = (rows**2 + columns**2 <= (min(height, width) // 4) ** 2).float()
    spectrum = torch.fft.fftshift(torch.fft.fft2(latents), dim=(-2, -1))

    def back(masked: Tensor) -> Tensor:
        return torch.fft.ifft2(torch.fft.ifftshift(masked, dim=(-2, -1))).real

    return back(spectrum * disc), back(spectrum * (1 - disc))


def ours(method: str, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    config, alphas_cumprod = FreqLossConfig.from_mapping({"freq_loss_method": method}), schedule()

    def loss(prediction: Tensor, target: Tensor, noisy: Tensor) -> Tensor:
        return frequency_matching_loss(
            prediction,
            target,
            prediction_type="epsilon",
            timesteps=TIMESTEP,
            alphas_cumprod=alphas_cumprod,
            config=config,
        ).total

    return loss


def measure(arms: dict[str, Callable], shape: tuple[int, ...], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of forward and backward per arm, the arms taking turns."""
    prediction, target, noisy = (torch.randn(shape, device=device) for _ in range(3))
    prediction.requires_grad_()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 3):
        # In an order of its own each time: an arm that follows a large one finds the caches cold.
        for name, arm in random.Random(repeat).sample(list(arms.items()), len(arms)):
            prediction.grad = None
            _wait(device)
            start = time.perf_counter()
            arm(prediction, target, noisy).backward()
            _wait(device)
            if repeat >= 3:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    device = torch.device(options.device)
    arms: dict[str, Callable] = {
        "mse": lambda prediction, target, noisy: F.mse_loss(prediction, target),
        "formula, wavelet": formula(library_wavelet(device)),
        "formula, fft": formula(shifted_fft),
        "ours, wavelet": ours("wavelet", device),
        "ours, fft": ours("fft", device),
    }
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {where}, float32\n")
    print(f"| latents | mse | {' | '.join(list(arms)[1:])} |")
    print("|---" * (len(arms) + 1) + "|")
    for shape in SHAPES:
        medians = measure(arms, shape, device, options.repeats)
        ratios = [f"×{medians[name] / medians['mse']:.1f}" for name in list(arms)[1:]]
        print(f"| {'×'.join(map(str, shape))} | {medians['mse'] * 1e6:.0f} µs | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
