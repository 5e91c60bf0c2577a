"""Tables: ratios to plain MSE, and how much of the way from it to all images sharp an arm goes. See plan.md.

A pair is a seed. Over several defects, the mean of each seed's logarithms counts, or that of its shares.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from benchmarks.what_helps.report import Comparison, Difference, Row, difference, read, sign, surviving

from .arms import ALL_SHARP, AS_IN_RUNS, BY_NAME, PLAIN, SHARP_ALONE, WITH_TERM
from .images import DEFECTS, NO_DEFECT
from .measures import OF_SAMPLES, VALIDATION
from .trial import KEY

PRIMARY = "validation"
# By the plan, these are what the correction counts: in every group and for every defect.
JUDGED = (AS_IN_RUNS,)
ALL_DEFECTS = "all"


class Group(NamedTuple):
    """What a table is about.

    Attributes:
        world: of the models.
        style: of the images.
        fraction: of them that have a defect.
    """

    world: str
    style: str
    fraction: str

    def __str__(self) -> str:
        return f"{self.world}, {self.style}, {float(self.fraction):.0%} with a defect"


# Seed to number, by defect and arm.
Numbers = dict[tuple[str, str], dict[str, float]]
Summary = Mapping[tuple[str, str], Difference]


def write(file: Path) -> None:
    """Write the tables beside a results file.

    Raises:
        SystemExit: it has no results.
    """
    # A trial that was repeated for its samples counts once.
    rows = list({tuple(row[name] for name in KEY): row for row in read(file)}.values())
    if not rows:
        raise SystemExit(f"{file} has no results: run the study first")
    file.with_suffix(".md").write_text(tables(rows) + "\n", encoding="utf-8")


def tables(rows: Sequence[Row]) -> str:
    """Markdown."""
    groups, seeds = _groups(rows), [int(row["seed"]) for row in rows]
    ratios = {group: _ratios(rows, group, PRIMARY, PLAIN) for group in groups}
    judged = {
        Comparison(str(group), arm, defect): value
        for group in groups
        for (defect, arm), value in ratios[group].items()
        if arm in JUDGED and defect != ALL_DEFECTS
    }
    marked = surviving(judged)
    lines = [
        f"{len(rows)} trials, seeds {min(seeds)} to {max(seeds)}.",
        "",
        "Validation error as a ratio to plain MSE minus 1, with 95% intervals; `+` better and `-` worse where 0 is "
        f"outside; `++` and `--` where it survives Holm's correction over the {len(judged)} primary comparisons.",
    ]
    for group in groups:
        survivors = {(each.measure, each.arm) for each in marked if each.model == str(group)}
        lines += _by_defect(group, ratios[group], survivors)
    lines += ["", f"Validation error as a ratio to {SHARP_ALONE} minus 1:"]
    for group in groups:
        lines += _by_defect(group, _ratios(rows, group, PRIMARY, SHARP_ALONE))
    lines += ["", "Share of the way from plain MSE (0) to all images sharp (1); none where these do not differ:"]
    for group in groups:
        lines += _by_defect(group, _shares(rows, group, ratios[group]), signed=False)
    lines += ["", "All defects together, other measures, without a correction; those of samples are differences:"]
    for group in groups:
        lines += _by_measure(rows, group)
    with_term = dict.fromkeys(Group(row["world"], row["style"], "0") for row in rows if row["arm"] == WITH_TERM)
    if with_term:
        lines += ["", "The distribution term (t = 800 to 1000, low band), against all images sharp without it:"]
    for group in with_term:
        lines += _by_measure([row for row in rows if row["arm"] in (ALL_SHARP, WITH_TERM)], group, ALL_SHARP)
    return "\n".join(lines)


def _groups(rows: Iterable[Row]) -> list[Group]:
    found = dict.fromkeys(Group(row["world"], row["style"], row["fraction"]) for row in rows)
    return [group for group in found if float(group.fraction)]


def _values(rows: Iterable[Row], group: Group, measure: str) -> Numbers:
    """Arms without imperfect images count for every defect, and that with all images sharp for every fraction, too."""
    found: Numbers = defaultdict(dict)
    rows = [row for row in rows if (row["world"], row["style"]) == group[:2] and row[measure]]
    rows = [row for row in rows if row["arm"] == ALL_SHARP or row["fraction"] == group.fraction]
    trained = {row["defect"] for row in rows} - {NO_DEFECT} or {NO_DEFECT}
    for row in rows:
        for defect in trained if row["defect"] == NO_DEFECT else (row["defect"],):
            found[defect, row["arm"]][row["seed"]] = float(row[measure])
    return found


def _over_defects(numbers: Numbers) -> Numbers:
    """With the means over all defects of seeds that have them all."""
    defects = {defect for defect, _arm in numbers}
    together: Numbers = {}
    for arm in {arm for _defect, arm in numbers}:
        by_defect = [numbers.get((defect, arm), {}) for defect in defects]
        seeds = set.intersection(*(set(each) for each in by_defect))
        together[ALL_DEFECTS, arm] = {seed: fmean(each[seed] for each in by_defect) for seed in seeds}
    return {**numbers, **together}


def _ratios(rows: Sequence[Row], group: Group, measure: str, control: str) -> Summary:
    """Of each arm to the control, by defect and over all."""
    values = _values(rows, group, measure)
    logarithms = {
        (defect, arm): {
            seed: math.log(value / values[defect, control][seed])
            for seed, value in of_arm.items()
            if seed in values.get((defect, control), {})
        }
        for (defect, arm), of_arm in values.items()
    }
    pairs = {
        key: [(math.exp(each), 1.0) for each in numbers.values()] for key, numbers in _over_defects(logarithms).items()
    }
    return {key: difference(each, is_ratio=True) for key, each in pairs.items() if len(each) > 1 and key[1] != control}


def _shares(rows: Sequence[Row], group: Group, ratios: Summary) -> Summary:
    """Of the way from plain MSE to all images sharp, where the interval between these has no 0 in it."""
    values, shares = _values(rows, group, PRIMARY), {}
    for (defect, arm), of_arm in values.items():
        way = ratios.get((defect, ALL_SHARP))
        if arm in (PLAIN, ALL_SHARP) or way is None or way.mean + way.half_width > 0:
            continue
        plain, best = values[defect, PLAIN], values[defect, ALL_SHARP]
        shares[defect, arm] = {
            seed: math.log(plain[seed] / value) / math.log(plain[seed] / best[seed])
            for seed, value in of_arm.items()
            if seed in plain and seed in best
        }
    pairs = {key: [(each, 0.0) for each in numbers.values()] for key, numbers in _over_defects(shares).items()}
    return {key: difference(each, is_ratio=False) for key, each in pairs.items() if len(each) > 1}


def _by_defect(
    group: Group, found: Summary, survivors: Container[tuple[str, str]] = (), *, signed: bool = True
) -> list[str]:
    """A table: arms by defects."""
    columns = [defect for defect in (*DEFECTS, ALL_DEFECTS) if any(key[0] == defect for key in found)]
    cells = {
        (arm, defect): _cell(value, signed=signed, survives=(defect, arm) in survivors)
        for (defect, arm), value in found.items()
    }
    return _table(str(group), columns, cells)


def _by_measure(rows: Sequence[Row], group: Group, control: str = PLAIN) -> list[str]:
    """A table: arms by measures, over all defects."""
    cells = {}
    for measure in (*VALIDATION, *OF_SAMPLES):
        is_ratio = measure in VALIDATION
        found = _ratios(rows, group, measure, control) if is_ratio else _differences(rows, group, measure)
        for (defect, arm), value in found.items():
            if defect == ALL_DEFECTS:
                cells[arm, measure] = _cell(value)
    shown = {measure for _arm, measure in cells}
    return _table(str(group), [name for name in (*VALIDATION, *OF_SAMPLES) if name in shown], cells)


def _differences(rows: Sequence[Row], group: Group, measure: str) -> Summary:
    """From plain MSE."""
    values = _over_defects(_values(rows, group, measure))
    found = {}
    for (defect, arm), of_arm in values.items():
        plain = values.get((defect, PLAIN), {})
        pairs = [(value, plain[seed]) for seed, value in of_arm.items() if seed in plain]
        if arm != PLAIN and len(pairs) > 1:
            found[defect, arm] = difference(pairs, is_ratio=False)
    return found


def _table(title: str, columns: Sequence[str], cells: Mapping[tuple[str, str], str]) -> list[str]:
    """Arms in their order; none where there are no cells."""
    arms = [arm.name for arm in BY_NAME.values() if any(key[0] == arm.name for key in cells)]
    if not arms:
        return []
    lines = ["", f"| {title} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    return [*lines, *(f"| {arm} | {' | '.join(cells.get((arm, column), '') for column in columns)} |" for arm in arms)]


def _cell(value: Difference, *, signed: bool = True, survives: bool = False) -> str:
    marks = sign(value, more_is_better=False) * (2 if survives else 1) if signed else ""
    return f"{value.mean:+.3f} ± {value.half_width:.3f} {marks}".rstrip()
