"""What images with a least timestep cost a batch, by the hosts' own functions that draw timesteps.

    python benchmarks/least_timesteps.py [--sd-scripts PATH] [--musubi-tuner PATH] [--batch 8] [--side 128]
                                         [--least 900] [--repeats 50] [--device cuda]

For every way in which the hosts draw timesteps: the host's function by itself, and the same where each image of the
batch has a least timestep; both in turn, on latents of 16 channels. The first batch of a size draws timesteps in
advance, which has a column of its own. Run it with the Python of the host.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.training.term import FrequencyTerm
from kohya_patch.musubi import timesteps as musubi_timesteps
from kohya_patch.sd_scripts import host
from kohya_patch.sd_scripts.timesteps import TimestepChoice

SD_SCRIPTS = {
    "flux_train_network": ("FluxNetworkTrainer", ("sigma", "uniform", "sigmoid", "shift", "flux_shift")),
    "lumina_train_network": ("LuminaNetworkTrainer", ("nextdit_shift",)),
}
MUSUBI = (
    *("sigma", "uniform", "sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift"),
    *("ideogram4_shift", "logsnr", "qinglong_flux", "qinglong_qwen"),
)

CHANNELS = 16


class Sampling(NamedTuple):
    """One way to draw timesteps: the host's function by itself, and with timesteps that were chosen."""

    name: str
    plain: Callable[[], Any]
    chosen: Callable[[FrequencyTerm, str], Any]


def of_sd_scripts(folder: Path, given: dict[str, Any]) -> Iterator[Sampling]:
    """Those of the flow trainers."""
    sys.path.insert(0, str(folder))
    for script, (class_name, samplings) in SD_SCRIPTS.items():
        module = importlib.import_module(script)
        trainer = getattr(module, class_name)
        drawing = host.drawing_function(trainer, "flow")
        for sampling in samplings:
            args = module.setup_parser().parse_args([])
            args.timestep_sampling = sampling
            arguments = {**given, "args": args, "noise_scheduler": trainer().get_noise_scheduler(args, given["device"])}

            def chosen(
                term: FrequencyTerm, stream: str, drawing: Any = drawing, arguments: dict[str, Any] = arguments
            ) -> Any:
                with TimestepChoice("flow", drawing).made_by(term.choose, stream):
                    return drawing.function(**arguments)

            def plain(drawing: Any = drawing, arguments: dict[str, Any] = arguments) -> Any:
                return drawing.function(**arguments)

            yield Sampling(f"sd-scripts, {sampling}", plain, chosen)


def of_musubi_tuner(folder: Path, given: dict[str, Any]) -> Iterator[Sampling]:
    """Those of FLUX.2's trainer, which has all of them."""
    sys.path.insert(0, str(folder / "src"))
    module = importlib.import_module("musubi_tuner.flux_2_train_network")
    common = importlib.import_module("musubi_tuner.training.parser_common").setup_parser_common()
    scheduling = importlib.import_module("musubi_tuner.modules.scheduling_flow_match_discrete")
    method = module.Flux2NetworkTrainer().get_noisy_model_input_and_timesteps
    parser = module.flux2_setup_parser(common)
    for sampling in MUSUBI:
        args = parser.parse_args([])
        args.timestep_sampling = sampling
        scheduler = scheduling.FlowMatchDiscreteScheduler(shift=args.discrete_flow_shift, reverse=True, solver="euler")
        arguments = {**given, "args": args, "noise_scheduler": scheduler, "timesteps": None}

        def chosen(term: FrequencyTerm, stream: str, arguments: dict[str, Any] = arguments) -> Any:
            return musubi_timesteps.chosen(method, arguments, term.choose, stream)

        def plain(arguments: dict[str, Any] = arguments) -> Any:
            return method(**arguments)

        yield Sampling(f"musubi-tuner, {sampling}", plain, chosen)


def measure(sampling: Sampling, least: torch.Tensor, repeats: int, device: torch.device) -> tuple[float, float, float]:
    """Milliseconds (on a CPU its own time): the host's function, how much more, pair by pair, and the first batch."""
    counts = {0: 1, int(least.max()): 1}  # half of the images
    term = FrequencyTerm(FreqLossConfig(dist_match=0.0), "flow", seed=0, least=counts)
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def timed(run: Callable[[], Any]) -> float:
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (clock() - start)

    def with_least() -> Any:
        return sampling.chosen(term, term.plan(least).own_stream)

    timed(sampling.plain)
    first = timed(with_least)
    pairs = [(timed(sampling.plain), timed(with_least)) for _ in range(repeats)]
    more = statistics.median(chosen - plain for plain, chosen in pairs)
    return statistics.median(plain for plain, _ in pairs), more, first


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd-scripts", type=Path)
    parser.add_argument("--musubi-tuner", type=Path)
    for name, default in (("batch", 8), ("side", 128), ("least", 900), ("repeats", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    latents, noise = torch.randn(2, options.batch, CHANNELS, options.side, options.side, device=device)
    given = {"latents": latents, "noise": noise, "device": device, "dtype": torch.float32}
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {hardware}, latents of {tuple(latents.shape)}, t >= {options.least}\n")
    print("| ms | host's function | more with least timesteps | first batch |\n|---|---|---|---|")
    for folder, samplings in ((options.sd_scripts, of_sd_scripts), (options.musubi_tuner, of_musubi_tuner)):
        with contextlib.redirect_stdout(io.StringIO()):  # the hosts print when they are imported
            made = list(samplings(folder, given)) if folder else []
        for sampling in made:
            least = torch.full((options.batch,), options.least)
            plain, more, first = measure(sampling, least, options.repeats, device)
            print(f"| {sampling.name} | {plain:.1f} | {more:.2f} | {first:.0f} |", flush=True)


if __name__ == "__main__":
    main()
