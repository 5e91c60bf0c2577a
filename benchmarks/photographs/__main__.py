"""Trains on imperfect photographs in every arm; trials whose results are there already are not repeated.

    pip install -e ".[study]"
    python -m benchmarks.photographs base       the base models, which are there already
    python -m benchmarks.photographs rates      learning rates, on seeds of their own
    python -m benchmarks.photographs study      every arm
    python -m benchmarks.photographs report     tables from the results

Results go to benchmarks/photographs/results, one line for each trial as soon as it ends. Where the photographs and
autoencoders come from is said by the error without them. What is compared, and how it is judged: plan.md.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from . import base, report, study
from .arms import BY_NAME, STUDY
from .images import DEFECTS, STYLES
from .trial import STEPS
from .worlds import WORLDS

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("base", "rates", "study", "report"))
    parser.add_argument("--worlds", nargs="+", choices=tuple(WORLDS), default=list(WORLDS))
    parser.add_argument("--styles", nargs="+", choices=tuple(STYLES), default=list(STYLES))
    parser.add_argument("--defects", nargs="+", choices=DEFECTS, default=list(DEFECTS))
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.75, 0.25], help="of images with the defect")
    names = [arm.name for arm in STUDY]
    parser.add_argument("--arms", nargs="+", choices=BY_NAME, metavar="ARM", default=names, help=", ".join(BY_NAME))
    parser.add_argument("--samples", action="store_true", help="draw and judge samples, too")
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--first_seed", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder; without rates.csv, our rates hold")
    parser.add_argument("--output", type=Path, default=Path("output/photographs"), help="where base models train")
    parser.add_argument("--steps", type=int, help=f"of base: {base.STEPS}; of a LoRA: {STEPS}")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    # Trials side by side, with one thread each, use a machine better than threads do.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # glibc keeps large blocks instead of giving them back and clearing them anew, which saves a fifth of the time.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000000")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "4000000000")
    if options.command == "base":
        base.train_all([WORLDS[name] for name in options.worlds], options.output, options.steps or base.STEPS)
    elif options.command == "rates":
        study.run_rates(options)
    elif options.command == "study":
        study.run_study(options, RESULTS / study.RATES)
    if options.command in ("study", "report"):
        report.write(options.results / study.RESULTS)


if __name__ == "__main__":
    main()
