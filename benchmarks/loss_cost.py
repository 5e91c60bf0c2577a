"""What the loss costs: forward and backward on latents, side by side with plain MSE, in one run.

    pip install wavelet-loss ptwt focal-frequency-loss        where they are missing, their columns are left out
    python benchmarks/loss_cost.py [--device cuda] [--repeats 30]

The arms take turns in changing order, so that a machine whose speed drifts hurts them alike; the table shows medians as
multiples of `F.mse_loss` forward and backward on the same tensors.

- mse            F.mse_loss
- formula, …     spec'd as written: recover 2B latents, decompose each with the usual library, sum, compare; the wavelet
                 by pytorch_wavelets' DWTForward and DWTInverse (made once), the FFT by fftshift and a disc
- formula, ptwt  the same by ptwt's wavedec2 and waverec2
- wavelet-loss   PyPI's WaveletLoss at its defaults: an MSE of weighted wavelet coefficients, sample by sample
- focal          PyPI's focal frequency loss at its defaults: an MSE of the spectrum, weighted by its own error
- ours, …        `freq_loss_plugin.frequency_matching_loss`

The other losses are other losses: they are here for their cost alone. A second table shows the most memory that tensors
hold during forward and backward, beyond the two inputs, as multiples of one of them (the gradient of plain MSE is one);
a third what the wavelet and the number of levels change, a fourth the statistics that `quality/` tried. With --plot
FILE the first is drawn, too.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from freq_loss_plugin import FreqLossConfig, frequency_matching_loss, wavelet_library
from freq_loss_plugin.drawing import new_figure

# Channels and size of latents by model and resolution, and batches of each.
LATENTS = {
    "SD1.5, 512 px": (4, 64, 64),
    "SDXL, 1024 px": (4, 128, 128),
    "FLUX, 1024 px": (16, 128, 128),
    "FLUX, 2048 px": (16, 256, 256),
}
BATCHES = (1, 4, 16, 64)
# Elements of the largest batch that is measured: 64 of SDXL, 4 of FLUX at 2048 px.
LARGEST = 2**22
# Of the third table.
WAVELETS, LEVELS, ONE_SIZE = ("haar", "db3", "sym5", "bior2.4", "db8"), (1, 2, 3, 4), (4, 4, 64, 64)
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


def ours(method: str, **options: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    config, alphas_cumprod = FreqLossConfig.from_mapping({"freq_loss_method": method, **options}), schedule()

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


def others(device: torch.device) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The losses of other packages, where these are installed."""
    arms: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    with contextlib.suppress(ImportError):
        import ptwt

        def split(latents: Tensor) -> tuple[Tensor, Tensor]:
            low, *details = ptwt.wavedec2(latents, "db3", mode="zero", level=2)
            zeros = [type(detail)(*map(torch.zeros_like, detail)) for detail in details]
            height, width = latents.shape[-2:]
            bands = (ptwt.waverec2(each, "db3") for each in ((low, *zeros), (torch.zeros_like(low), *details)))
            first, second = (band[..., :height, :width] for band in bands)
            return first, second

        arms["formula, ptwt"] = formula(split)
    with contextlib.suppress(ImportError):
        wavelet_library.load()
        from wavelet_loss import WaveletLoss

        wavelet_loss = WaveletLoss(device=device)
        arms["wavelet-loss"] = lambda prediction, target, noisy: wavelet_loss(prediction, target)[0]
    with contextlib.suppress(ImportError):
        from focal_frequency_loss import FocalFrequencyLoss

        focal = FocalFrequencyLoss()
        arms["focal"] = lambda prediction, target, noisy: focal(prediction, target)
    return arms


def statistics_tried() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Those of the arms of the study in `quality/` that are no part of the loss."""
    sys.path.insert(0, str(Path(__file__).parent / "quality"))
    from arms import Batch, Term, mmd, moments, spectrum

    alphas_cumprod = schedule()

    def loss(term: Term) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda prediction, target, clean: term(Batch(prediction, target, clean, TIMESTEP, alphas_cumprod))

    return {term.__name__: loss(term) for term in (moments, spectrum, mmd)}


def measure(arms: dict[str, Callable], shape: tuple[int, ...], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of forward and backward per arm, the arms taking turns."""
    prediction, target, noisy = inputs(shape, device)
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


class Held(TorchDispatchMode):
    """The most bytes that tensors hold beside ``given``; what an operator needs inside itself is not seen."""

    def __init__(self, given: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.most = 0
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._given:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return made


def memory(arms: dict[str, Callable], shape: tuple[int, ...], device: torch.device) -> dict[str, float]:
    """Most bytes held in one forward and backward pass per arm, as multiples of one input."""
    found = {}
    for name, arm in arms.items():
        prediction, target, noisy = inputs(shape, device)
        arm(prediction, target, noisy).backward()  # whatever is made once
        prediction.grad = None
        with Held((prediction, target, noisy)) as held:
            arm(prediction, target, noisy).backward()
        found[name] = held.most / (prediction.numel() * prediction.element_size())
    return found


def inputs(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    prediction, target, noisy = (torch.randn(shape, device=device) for _ in range(3))
    return prediction.requires_grad_(), target, noisy


def draw(measured: dict[tuple[str, int], dict[str, float]], file: str, heading: str) -> None:
    """One panel for each kind of latent: batch to multiples of plain MSE, one curve for each arm."""
    figure = new_figure(1300, 420, layout="constrained")
    names = list(dict.fromkeys(name for name, _ in measured))
    for axis, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        batches = [batch for each, batch in measured if each == name]
        for arm in list(measured[name, batches[0]])[1:]:
            ratios = [measured[name, batch][arm] / measured[name, batch]["mse"] for batch in batches]
            width = 2.5 if arm.startswith("ours") else 1.0
            axis.loglog(batches, ratios, marker="o", markersize=3, linewidth=width, label=arm)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(name, fontsize=10)
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.set_xlabel("batch")
        axis.minorticks_off()
        axis.set_yticks([1, 3, 10, 30, 100], ["×1", "×3", "×10", "×30", "×100"])
    figure.axes[0].set_ylabel("forward and backward, times plain MSE", fontsize=8)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.suptitle(heading, fontsize=8)
    figure.savefig(file)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--plot", metavar="FILE", help="draw the first table")
    options = parser.parse_args()
    device = torch.device(options.device)
    arms: dict[str, Callable] = {
        "mse": lambda prediction, target, noisy: F.mse_loss(prediction, target),
        "formula, wavelet": formula(library_wavelet(device)),
        "formula, fft": formula(shifted_fft),
        **others(device),
        "ours, wavelet": ours("wavelet"),
        "ours, fft": ours("fft"),
    }
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {where}, float32\n")
    batches = [(name, batch, (batch, *latent)) for name, latent in LATENTS.items() for batch in BATCHES]
    batches = [each for each in batches if math.prod(each[2]) <= LARGEST]
    print(f"| latents | batch | mse | {' | '.join(list(arms)[1:])} |")
    print("|---" * (len(arms) + 2) + "|")
    measured = {}
    for name, batch, shape in batches:
        medians = measured[name, batch] = measure(arms, shape, device, options.repeats)
        ratios = [f"×{medians[arm] / medians['mse']:.1f}" for arm in list(arms)[1:]]
        print(f"| {name} | {batch} | {medians['mse'] * 1e6:.0f} µs | {' | '.join(ratios)} |", flush=True)
    print(f"\n| memory | batch | {' | '.join(arms)} |")
    print("|---" * (len(arms) + 2) + "|")
    for name, batch, shape in batches:
        if batch in (4, 64):
            held = memory(arms, shape, device)
            print(f"| {name} | {batch} | {' | '.join(f'{value:.1f}' for value in held.values())} |")
    print(f"\n| {'×'.join(map(str, ONE_SIZE))} | {' | '.join(f'J = {levels}' for levels in LEVELS)} |")
    print("|---" * (len(LEVELS) + 1) + "|")
    variants: dict[str, Callable] = {"mse": arms["mse"]}
    for wavelet in WAVELETS:
        for levels in LEVELS:
            named = {"freq_loss_wavelet": wavelet, "freq_loss_levels": levels}
            variants[f"{wavelet} {levels}"] = ours("wavelet", **named)
    medians = measure(variants, ONE_SIZE, device, 2 * options.repeats)
    for wavelet in WAVELETS:
        ratios = [f"×{medians[f'{wavelet} {levels}'] / medians['mse']:.1f}" for levels in LEVELS]
        print(f"| {wavelet} | {' | '.join(ratios)} |")
    terms = {"mse": arms["mse"], "ours, wavelet": arms["ours, wavelet"], **statistics_tried()}
    print(f"\n| statistic | {' | '.join(list(terms)[1:])} |\n{'|---' * len(terms)}|")
    for shape in (ONE_SIZE, (4, 16, 256, 256)):
        medians = measure(terms, shape, device, options.repeats)
        ratios = [f"×{medians[name] / medians['mse']:.1f}" for name in list(terms)[1:]]
        print(f"| {'×'.join(map(str, shape))} | {' | '.join(ratios)} |")
    if options.plot:
        draw(measured, options.plot, f"torch {torch.__version__}, {where}, float32")


if __name__ == "__main__":
    main()
