"""Runs a study; trials whose results are there already are not repeated.

    pip install -e ".[study]" ; npm fetches the emoji
    python -m benchmarks.what_helps rates          learning rates, on seeds of their own
    python -m benchmarks.what_helps balance        balanced losses
    python -m benchmarks.what_helps imperfect      images with defects
    python -m benchmarks.what_helps real_fake      classifiers trained on samples
    python -m benchmarks.what_helps report         tables and plots from the results

Results go to benchmarks/what_helps/results, one line for each trial as soon as it ends. What is compared, and how it is
judged, was fixed before: plan.md.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import plots, report, trial
from .arms import ARMS
from .images import DEFECTS, MIXTURE

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=(*ARMS, "report"))
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--first_seed", type=int, default=1000)
    parser.add_argument("--styles", nargs="+", choices=(*trial.TOY, *trial.EMOJI), help="some of them")
    parser.add_argument("--defects", nargs="+", choices=(MIXTURE, *DEFECTS), help="of the study imperfect")
    names = dict.fromkeys(arm.name for arms in ARMS.values() for arm in arms)
    parser.add_argument("--arms", nargs="+", choices=names, metavar="ARM", help="some of them, as in the tables")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder; without rates.csv, our rates hold")
    parser.add_argument("--output", type=Path, default=Path("output/what_helps"), help="where samples are kept")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.study != "report":
        _run_all(options)
    _write(options.results, options.output)


def _run_all(options: argparse.Namespace) -> None:
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    if options.study == "rates":
        trials = trial.rate_trials()
    else:
        rates = report.best_rates(report.read(options.results / "rates.csv") or report.read(RESULTS / "rates.csv"))
        trials = trial.STUDIES[options.study](seeds, rates)
    file = options.results / f"{options.study}.csv"
    done = {tuple(row[name] for name in report.KEY) for row in report.read(file)}
    trials = [
        each
        for each in trials
        if each.key not in done
        and each.style in (options.styles or [each.style])
        and each.arm in (options.arms or [each.arm])
        and each.defect in (options.defects or [each.defect])
    ]
    options.results.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.study != "real_fake":
        for style in {each.style for each in trials}:
            trial.reference_of(style, options.output, options.device)
    # Trials side by side, with one thread each, use a machine better than threads do.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        waiting = [pool.submit(trial.run_alone, each, options.output, options.device) for each in trials]
        for ended in tqdm(as_completed(waiting), total=len(waiting), file=sys.stdout):
            _append(ended.result(), file)


def _write(results: Path, samples: Path) -> None:
    """Tables and plots of the studies that have results, and a plot of the main arms of all."""
    found = {study: rows for study in report.PRIMARY if (rows := report.read(results / f"{study}.csv"))}
    for study, rows in found.items():
        (results / f"{study}.md").write_text(report.tables(study, rows) + "\n", encoding="utf-8")
        if study in plots.TITLES:  # the third has one measure, which a table shows as well
            plots.forest({study: ()}, results, report.PRIMARY[study], results / f"{study}.png")
        plots.sheet(study, rows, samples, results / f"{study}_samples.jpg")
    if plots.MAIN.keys() <= found.keys():
        plots.forest(plots.MAIN, results, plots.MAIN_MEASURES, results / "main.png")


def _append(row: dict[str, Any], file: Path) -> None:
    """Add a line; a measure that a world does not have stays empty."""
    rows = [*report.read(file), row]
    columns = list(dict.fromkeys(name for each in rows for name in each))
    part = file.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as target:
        writer = csv.DictWriter(target, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(file)


if __name__ == "__main__":
    main()
