"""What matching the batch of all processes costs: the loss in N processes, each with its own part, or with all of them.

    python benchmarks/processes.py [--counts 1 2 4] [--repeats 50] [--device cuda]

Each process has a batch of its own (so the whole batch grows with N), one thread, and for each size takes turns between
`freq_loss_scope = "local"` and `"global"`; forward and backward. Over gloo on the CPU, over NCCL with one GPU for each
process. Shown are medians of the slowest process.
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

from freq_loss_plugin import FreqLossConfig, frequency_matching_loss

LATENTS = {
    "SD1.5, 512 px": (4, 4, 64, 64),
    "SDXL, 1024 px": (4, 4, 128, 128),
    "FLUX, 2048 px": (1, 16, 256, 256),
}


def work(rank: int, count: int, device: str, repeats: int, address: str, results: Any) -> None:
    """One process: time every size and scope, and let the first process tell."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=count)
    for name, shape in LATENTS.items():
        for scope, seconds in measure(shape, torch.device(device), repeats).items():
            slowest = torch.tensor(statistics.median(seconds), device=device)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if rank == 0:
                results.put((name, scope, slowest.item()))
    dist.destroy_process_group()


def measure(shape: tuple[int, ...], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of forward and backward by scope."""
    prediction, target = torch.randn(shape, device=device, requires_grad=True), torch.randn(shape, device=device)
    configs = {scope: FreqLossConfig.from_mapping({"freq_loss_scope": scope}) for scope in ("local", "global")}
    seconds: dict[str, list[float]] = {scope: [] for scope in configs}
    for repeat in range(repeats + 3):
        for scope, config in configs.items():
            dist.barrier()
            start = time.perf_counter()
            loss = frequency_matching_loss(
                prediction, target, prediction_type="flow", timesteps=400, config=config, across_processes=True
            )
            loss.total.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 3:
                seconds[scope].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} cores"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {where}, float32\n")
    print("| latents in each process | processes | local | global |\n|---|---|---|---|")
    spawn = multiprocessing.get_context("spawn")
    for place, count in enumerate(options.counts):
        results, address = spawn.SimpleQueue(), f"tcp://127.0.0.1:{29600 + place}"
        arguments = (count, options.device, options.repeats, address, results)
        multiprocessing.spawn(work, arguments, nprocs=count)
        found = {}
        while not results.empty():
            name, scope, seconds = results.get()
            found[name, scope] = seconds
        for name, shape in LATENTS.items():
            local, together = found[name, "local"], found[name, "global"]
            shown = f"{name}, {'×'.join(map(str, shape))}"
            print(f"| {shown} | {count} | {local * 1e6:.0f} µs | {together * 1e6:.0f} µs |", flush=True)


if __name__ == "__main__":
    main()
