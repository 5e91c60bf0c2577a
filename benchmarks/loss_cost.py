"""What the loss costs: forward and backward on latents, next to plain MSE, in one run.

    pip install wavelet-loss ptwt focal-frequency-loss        optional: their columns
    python benchmarks/loss_cost.py [--device cuda] [--repeats 30]

The losses (`compared_losses.py`) take turns in random order, so that a machine whose speed drifts affects all of them;
the first table shows medians as multiples of `F.mse_loss` forward and backward on the same tensors.

- mse            F.mse_loss
- formula, …     as the equation is written: recover 2B latents, split each with the usual library, sum, compare; the
                 wavelet by pytorch_wavelets' DWTForward and DWTInverse (created once), the FFT by fftshift and a disc
- formula, ptwt  the same by ptwt's wavedec2 and waverec2
- wavelet-loss   PyPI's WaveletLoss at its defaults: an MSE of weighted wavelet coefficients per sample
- focal          PyPI's focal frequency loss at its defaults: an MSE of the spectrum, weighted by its own error
- ours, …        `freq_loss_plugin.frequency_matching_loss`

The other packages compute different losses; they are here for their cost alone. A second table shows the peak memory of
forward and backward, without the inputs, as multiples of one input (the gradient of plain MSE is one); a third the cost
by wavelet and number of levels; a fourth the statistics that `quality/` tried. --plot FILE draws the first table.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import statistics
import time
from typing import Any

import torch
from compared_losses import Loss, all_losses, ours, statistics_of_the_study
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from freq_loss_plugin.analysis.figures import new_figure

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
# Repeats that do not count.
WARMUP = 3


def measure(losses: dict[str, Loss], shape: tuple[int, ...], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of forward and backward by loss, the losses taking turns."""
    prediction, target, noisy = inputs(shape, device)
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for repeat in range(repeats + WARMUP):
        # In random order: a loss that follows a large one finds the caches cold.
        for name, loss in random.Random(repeat).sample(list(losses.items()), len(losses)):
            prediction.grad = None
            _wait(device)
            start = time.perf_counter()
            loss(prediction, target, noisy).backward()
            _wait(device)
            if repeat >= WARMUP:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors occupy at once, without ``inputs`` and without the workspace inside an operator.

    The same on every device, where the allocator's own count is rounded and exists for CUDA alone.
    """

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.peak = 0
        self._inputs = {tensor.untyped_storage()._cdata for tensor in inputs}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._inputs:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def memory(losses: dict[str, Loss], shape: tuple[int, ...], device: torch.device) -> dict[str, float]:
    """Peak memory of one forward and backward pass by loss, as multiples of one input."""
    peaks = {}
    for name, loss in losses.items():
        prediction, target, noisy = inputs(shape, device)
        loss(prediction, target, noisy).backward()  # creates what is cached
        prediction.grad = None
        with PeakMemory((prediction, target, noisy)) as recorded:
            loss(prediction, target, noisy).backward()
        peaks[name] = recorded.peak / (prediction.numel() * prediction.element_size())
    return peaks


def inputs(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, target and noisy latents."""
    prediction, target, noisy = (torch.randn(shape, device=device) for _ in range(3))
    return prediction.requires_grad_(), target, noisy


def sizes() -> list[tuple[str, int, tuple[int, ...]]]:
    """Kind of latent, batch and shape of everything that is measured."""
    every = [(name, batch, (batch, *latent)) for name, latent in LATENTS.items() for batch in BATCHES]
    return [size for size in every if math.prod(size[2]) <= LARGEST]


def print_costs(losses: dict[str, Loss], device: torch.device, repeats: int) -> dict[tuple[str, int], dict[str, float]]:
    """The first table; returns its seconds by kind of latent and batch."""
    _print_row("latents", "batch", "mse", *list(losses)[1:])
    _print_rule(len(losses) + 2)
    measured = {}
    for name, batch, shape in sizes():
        seconds = measured[name, batch] = measure(losses, shape, device, repeats)
        _print_row(name, str(batch), f"{seconds['mse'] * 1e6:.0f} µs", *_multiples(seconds))
    return measured


def print_memory(losses: dict[str, Loss], device: torch.device) -> None:
    """The second table."""
    _print_row("memory", "batch", *losses)
    _print_rule(len(losses) + 2)
    for name, batch, shape in sizes():
        if batch in (4, 64):
            _print_row(name, str(batch), *(f"{peak:.1f}" for peak in memory(losses, shape, device).values()))


def print_wavelets(mse: Loss, device: torch.device, repeats: int) -> None:
    """The third table."""
    _print_row("×".join(map(str, ONE_SIZE)), *(f"J = {levels}" for levels in LEVELS))
    _print_rule(len(LEVELS) + 1)
    variants = {(wavelet, levels): ours(wavelet=wavelet, levels=levels) for wavelet in WAVELETS for levels in LEVELS}
    losses = {"mse": mse, **{f"{wavelet} {levels}": loss for (wavelet, levels), loss in variants.items()}}
    multiples = iter(_multiples(measure(losses, ONE_SIZE, device, repeats)))
    for wavelet in WAVELETS:
        _print_row(wavelet, *(next(multiples) for _ in LEVELS))


def print_statistics(losses: dict[str, Loss], device: torch.device, repeats: int) -> None:
    """The fourth table."""
    compared = {"mse": losses["mse"], "ours, wavelet": losses["ours, wavelet"], **statistics_of_the_study()}
    _print_row("statistic", *list(compared)[1:])
    _print_rule(len(compared))
    for shape in (ONE_SIZE, (4, 16, 256, 256)):
        _print_row("×".join(map(str, shape)), *_multiples(measure(compared, shape, device, repeats)))


def draw(measured: dict[tuple[str, int], dict[str, float]], file: str, heading: str) -> None:
    """One panel for each kind of latent: batch to multiples of plain MSE, one curve for each loss."""
    figure = new_figure(1300, 420, layout="constrained")
    names = list(dict.fromkeys(name for name, _ in measured))
    for axis, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        batches = [batch for kind, batch in measured if kind == name]
        for loss in list(measured[name, batches[0]])[1:]:
            ratios = [measured[name, batch][loss] / measured[name, batch]["mse"] for batch in batches]
            width = 2.5 if loss.startswith("ours") else 1.0
            axis.loglog(batches, ratios, marker="o", markersize=3, linewidth=width, label=loss)
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


def _multiples(seconds: dict[str, float]) -> list[str]:
    """Of plain MSE, for every other loss."""
    return [f"×{value / seconds['mse']:.1f}" for name, value in seconds.items() if name != "mse"]


def _print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def _print_rule(columns: int) -> None:
    print("|---" * columns + "|")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--plot", metavar="FILE", help="draw the first table")
    options = parser.parse_args()
    device = torch.device(options.device)
    losses = all_losses(device)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    heading = f"torch {torch.__version__}, Python {platform.python_version()}, {hardware}, float32"
    print(f"{heading}\n")
    measured = print_costs(losses, device, options.repeats)
    print()
    print_memory(losses, device)
    print()
    print_wavelets(losses["mse"], device, 2 * options.repeats)
    print()
    print_statistics(losses, device, options.repeats)
    if options.plot:
        draw(measured, options.plot, heading)


if __name__ == "__main__":
    main()
