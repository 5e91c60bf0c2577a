"""Does the loss help? LoRAs on the toy model, in every arm, with several seeds, on both styles that it has not seen.

    pip install -e ".[study]"
    pip install wavelet-loss focal-frequency-loss        optional: the arms of these packages
    python benchmarks/quality/study.py [--seeds 5] [--steps 120] [--output output/quality]

Finished trials are not repeated, so an interrupted study continues where it stopped, and more seeds or arms can be
added later. Writes one JSON file for each trial, `results.csv` with all of them, the tables `results.md`, `forest.png`
and `samples.png`. What is trained and measured, and how: `arms.py`, `trial.py`, `metrics.py`, `report.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import report
import torch
import trial
from arms import all_arms
from tqdm import tqdm

from freq_loss_plugin.toy_model.scenes import STYLES

SHOWN = ("plain MSE", "control: weighted MSE, 10%", "wavelet, 10%", "wavelet, 20%", "focal, as published")


def work(each: trial.Trial, folder: Path, device: str) -> dict[str, Any]:
    """One trial, in a process of its own with one thread: trials side by side use a machine better than threads do."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    return trial.run(each, folder, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--arms", nargs="+", help="some of them; all where left out", choices=tuple(all_arms()))
    parser.add_argument("--styles", nargs="+", choices=STYLES[1:], default=STYLES[1:])
    parser.add_argument("--output", type=Path, default=Path("output/quality"))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", help="cuda for more seeds and steps; then choose --processes")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options.output.mkdir(parents=True, exist_ok=True)
    for style in options.styles:
        trial.reference_of(style, options.output, options.device)
    arms = [name for name in all_arms() if not options.arms or name in options.arms or name == report.PLAIN]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    # Seed by seed, so that an interrupted study has whole pairs.
    trials = [
        trial.Trial(arm, seed, style, options.steps) for seed in seeds for style in options.styles for arm in arms
    ]
    results = []
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        waiting = [pool.submit(work, each, options.output, options.device) for each in trials]
        for done in tqdm(as_completed(waiting), total=len(waiting), file=sys.stdout):
            results.append(done.result())
    order = list(all_arms())
    results.sort(key=lambda each: (order.index(each["arm"]), each["style"], each["seed"]))
    report.write(results, options.output / "results.csv")
    text = report.tables(results)
    (options.output / "results.md").write_text(text + "\n", encoding="utf-8")
    report.forest(results, options.output / "forest.png")
    report.images(results, options.output, [arm for arm in SHOWN if arm in arms], options.output / "samples.png")
    print(text)


if __name__ == "__main__":
    main()
