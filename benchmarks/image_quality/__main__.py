"""How much of what is wrong with photographs is found, beside what others use.

    pip install -e ".[study]"
    python -m benchmarks.image_quality [PHOTOS...] [--output FILE]

PHOTOS are sharp images or folders of them; where left out, Kodak's and McMaster's, and every fourth of BSDS500's test
images (benchmarks/photographs says where they are). Each defect is made on every other photograph; the threshold of
the variance of the Laplacian is that with 2% false alarms on the rest. The table has fractions that were found, with
Wilson's 95% intervals, and for this project what was called not known.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from statsmodels.stats.proportion import proportion_confint
from tqdm import tqdm

from benchmarks.photographs import photographs
from freq_loss_plugin.image_folders import of_folder

from .defects import GOOD
from .found import KINDS, MAKES, Found, measure

_BSDS_EVERY = 4
_FALSE_ALARMS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.md"))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    files = [file for each in options.photos for file in (of_folder(each) if each.is_dir() else [each])]
    files = files or default_photographs()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    jobs = [(name, file, number % 2) for name in MAKES for number, file in enumerate(files)]
    jobs = [job for job in jobs if job[2] or job[0] in GOOD]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        names, of_files = [job[0] for job in jobs], [job[1] for job in jobs]
        found = list(tqdm(pool.map(measure, names, of_files, chunksize=8), total=len(jobs)))
    by_name: dict[str, list[Found]] = {name: [] for name in MAKES}
    chosen_on: list[Found] = []
    for (name, _, is_reported), one in zip(jobs, found, strict=True):
        (by_name[name] if is_reported else chosen_on).append(one)
    options.output.write_text(table(by_name, chosen_on, files) + "\n", encoding="utf-8")
    print(options.output.read_text(encoding="utf-8"))


def default_photographs() -> list[Path]:
    """See above."""
    return [*photographs.study_photographs(), *photographs.test_photographs()[::_BSDS_EVERY]]


def table(by_name: dict[str, list[Found]], chosen_on: Sequence[Found], files: Sequence[Path]) -> str:
    """Markdown."""
    scores = list(chosen_on[0].scores)
    thresholds = {name: float(np.quantile([one.scores[name] for one in chosen_on], _FALSE_ALARMS)) for name in scores}
    lines = [
        f"{len(files)} photographs, every other one reported.",
        "",
        f"| | found | not known | resolution, median | {' | '.join(scores)} |",
        "|---" * (4 + len(scores)) + "|",
    ]
    for kind, makes in KINDS.items():
        for name in makes:
            rows = by_name[name]
            hits = [kind in one.kinds if kind else bool(one.kinds) for one in rows]
            cells = [_fraction(hits), _fraction([one.is_unknown for one in rows])]
            cells += [f"{np.median([one.resolution for one in rows]):.2f}"]
            cells += [_fraction([one.scores[score] < thresholds[score] for one in rows]) for score in scores]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _fraction(hits: Sequence[bool]) -> str:
    low, high = proportion_confint(sum(hits), len(hits), method="wilson")
    return f"{np.mean(hits):.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
