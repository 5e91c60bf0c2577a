"""What matching the batches of all processes costs: the loss in N processes, over each one's own batch or over all.

    python benchmarks/processes.py [--counts 1 2 4] [--repeats 50] [--device cuda]

Each process has one thread and its own batch, so the whole batch grows with N, and takes turns between the loss by
itself (alone) and the frequency term of a run (together); forward and backward, over gloo on the CPU or NCCL with one
GPU per process. The table shows medians of the slowest process.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.multiprocessing.spawn import spawn as start_processes

from freq_loss_plugin import FreqLossConfig, frequency_matching_loss
from freq_loss_plugin.training.passes import Pass
from freq_loss_plugin.training.term import FrequencyTerm

LATENTS = {
    "SD1.5, 512 px": (4, 4, 64, 64),
    "SDXL, 1024 px": (4, 4, 128, 128),
    "FLUX, 2048 px": (1, 16, 256, 256),
}


def work(rank: int, count: int, device: str, repeats: int, address: str, results: Any) -> None:
    """One process: time both for every size; the first process puts (size, which, seconds) into ``results``."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=count)
    for name, shape in LATENTS.items():
        for which, seconds in measure(shape, torch.device(device), repeats).items():
            slowest = torch.tensor(statistics.median(seconds), device=device)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if rank == 0:
                results.put((name, which, slowest.item()))
    dist.destroy_process_group()


def measure(shape: tuple[int, ...], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of forward and backward, alone and together."""
    prediction, target = torch.randn(shape, device=device, requires_grad=True), torch.randn(shape, device=device)
    passed, base_loss = Pass(prediction, target, timesteps=400), torch.zeros((), device=device)
    config = FreqLossConfig(timesteps="own")
    term = FrequencyTerm(config, "flow", seed=0)

    def alone() -> None:
        frequency_matching_loss(
            prediction, target, prediction_type="flow", timesteps=passed.timesteps, config=config
        ).total.backward()

    def together() -> None:
        term.join(passed, base_loss).backward()

    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    for repeat in range(repeats + 3):
        term.plan()
        for run in (alone, together):
            dist.barrier()
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 3:
                seconds[run.__name__].append(time.perf_counter() - start)
        term.settle(repeat)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} cores"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {hardware}, float32\n")
    print("| latents in each process | processes | alone | together |\n|---|---|---|---|")
    spawn = multiprocessing.get_context("spawn")
    for place, count in enumerate(options.counts):
        results, address = spawn.SimpleQueue(), f"tcp://127.0.0.1:{29600 + place}"
        arguments = (count, options.device, options.repeats, address, results)
        start_processes(work, arguments, nprocs=count)
        measured = {}
        while not results.empty():
            name, which, seconds = results.get()
            measured[name, which] = f"{seconds * 1e6:.0f} µs"
        for name, shape in LATENTS.items():
            cells = (
                f"{name}, {'×'.join(map(str, shape))}",
                str(count),
                measured[name, "alone"],
                measured[name, "together"],
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
