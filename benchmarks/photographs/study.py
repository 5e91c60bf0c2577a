"""Which trials there are, and running them side by side."""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.what_helps.report import read

from .arms import ALL_SHARP
from .cell import Cell
from .images import NO_DEFECT, STYLES
from .measures import OF_SAMPLES
from .trial import COLUMNS, KEY, STEPS, Trial, run, trial_of
from .worlds import WORLDS

RATES, RESULTS = "rates.csv", "study.csv"
_RATES, _RATE_SEEDS = (5e-4, 1e-3, 2e-3, 4e-3), (900, 901)


def run_rates(options: argparse.Namespace) -> None:
    """Every learning rate, on sharp images only."""
    cells = [
        Cell(world, style, NO_DEFECT, 0.0, seed)
        for world in options.worlds
        for seed in _RATE_SEEDS
        for style in options.styles
    ]
    trials = [Trial(cell, ALL_SHARP, rate) for cell in cells for rate in _RATES]
    _run_all(trials, options, options.results / RATES, samples=False)


def run_study(options: argparse.Namespace, default_rates: Path) -> None:
    """Seed by seed, so that an interrupted study has whole pairs.

    Args:
        options: of the command line.
        default_rates: results of `run_rates`, where ``options.results`` has none.
    """
    rates = _best_rates(options.results / RATES if (options.results / RATES).is_file() else default_rates)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    cells = [
        Cell(world, style, defect, fraction, seed)
        for seed in seeds
        for world in options.worlds
        for style in options.styles
        for fraction in options.fractions
        for defect in options.defects
    ]
    trials = [trial_of(cell, arm, rates[cell.world, cell.style]) for cell in cells for arm in options.arms]
    _run_all(trials, options, options.results / RESULTS, samples=options.samples)


def _best_rates(file: Path) -> dict[tuple[str, str], float]:
    """For each world and style the learning rate with the least mean logarithm of the validation error."""
    errors: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read(file):
        errors[row["world"], row["style"]][float(row["rate"])].append(math.log(float(row["validation"])))
    missing = [f"{world}, {style}" for world in WORLDS for style in STYLES if (world, style) not in errors]
    if missing:
        raise SystemExit(f"{file} has no learning rates of {'; '.join(missing)}: run rates first")
    return {key: min(by_rate, key=lambda rate: sum(by_rate[rate])) for key, by_rate in errors.items()}


def _run_all(trials: Iterable[Trial], options: argparse.Namespace, file: Path, *, samples: bool) -> None:
    """Run those that are missing. The arms of a cell run one after another in one process, which keeps its latents."""
    # Those without samples are repeated where samples are asked for.
    done = {tuple(row[name] for name in KEY) for row in read(file) if row[OF_SAMPLES[0]] or not samples}
    by_cell: dict[Cell, list[Trial]] = defaultdict(list)
    for trial in dict.fromkeys(trials):
        if trial.key not in done:
            by_cell[trial.cell].append(trial)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        file.write_text(_line(COLUMNS), encoding="utf-8")
    steps = options.steps or STEPS
    if options.processes == 1:
        for part in tqdm(by_cell.values(), file=sys.stdout):
            _run_cell(part, file, steps, samples)
        return
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        waiting = [pool.submit(_run_cell, part, file, steps, samples) for part in by_cell.values()]
        for ended in tqdm(as_completed(waiting), total=len(waiting), file=sys.stdout):
            ended.result()


def _run_cell(trials: Sequence[Trial], file: Path, steps: int, samples: bool) -> None:
    torch.set_num_threads(1)
    for trial in trials:
        row = run(trial, steps=steps, samples=samples)
        # One write for each line: lines of other processes cannot come in between.
        with file.open("a", encoding="utf-8", newline="") as target:
            target.write(_line([row.get(name, "") for name in COLUMNS]))


def _line(values: Iterable[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
