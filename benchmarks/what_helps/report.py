"""Tables of the studies: paired differences, 95% intervals, Holm's correction. See plan.md.

A pair is a style, a defect and a seed, trained in two arms. The interval of a mean difference is Student's, over pairs.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

from .arms import ARMS, PLAIN, REAL, SHAM
from .images import DEFECTS

KEY = ("arm", "images", "defect", "seed", "rate")
Row = Mapping[str, str]
# Primary measures: name to whether more is better.
PRIMARY = {
    "balance": {
        "validation": False,
        "structure": True,
        "spectrum low": False,
        "spectrum high": False,
        "kernel distance": False,
        "color error": False,
    },
    "imperfect": {
        "structure": True,
        "background": True,
        "spectrum low": False,
        "spectrum high": False,
        "kernel distance": False,
        "fidelity": True,
    },
    "real_fake": {"accuracy": True},
}
# Others that are shown, where a world has them.
SECONDARY = {"texture": True, "style": True, "validation 50 low": False, "validation 50 high": False}
SECONDARY |= {"validation 950 low": False, "validation 950 high": False}
# What an arm is compared with, besides plain MSE: what users have already.
CONTROLS = {
    "balance": ("twice the steps", "debiased estimation"),
    "imperfect": ("sharp images alone", "min_timestep = 600 for all"),
    "real_fake": (REAL,),
}
# By the plan, these are shown, but are no comparisons that the correction counts.
_NOT_JUDGED = (SHAM, REAL)
_SECOND_MODEL = ("twitter", "line art")


class Difference(NamedTuple):
    """A mean of paired differences, the half width of its 95% interval, Student's p, and the number of pairs.

    Of measures of validation error it is a ratio minus 1, from means of logarithms.
    """

    mean: float
    half_width: float
    p: float
    pairs: int


class Comparison(NamedTuple):
    """What is compared: a model (``toy`` or ``emoji``), an arm, and a measure."""

    model: str
    arm: str
    measure: str


def read(file: Path) -> list[Row]:
    """The lines of a results file; none where there is no file."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as source:
        return list(csv.DictReader(source))


def samples_name(study: str, key: Iterable[str]) -> str:
    """The name of the file in which the samples of a trial are kept."""
    return f"{study}-{'-'.join(key).replace(' ', '_')}.npy"


def best_rates(rows: Sequence[Row]) -> dict[tuple[bool, str], float]:
    """For each model (whether it is the second) and arm the learning rate with the least validation error.

    Raises:
        SystemExit: there are no results of the study of learning rates.
    """
    errors: dict[tuple[bool, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        errors[_is_second(row), row["arm"]][float(row["rate"])].append(math.log(float(row["validation"])))
    if not errors:
        raise SystemExit("no learning rates have been chosen: run the study rates first")
    return {key: min(by_rate, key=lambda rate: np.mean(by_rate[rate])) for key, by_rate in errors.items()}


def differences(rows: Iterable[Row], measures: Iterable[str], control: str = PLAIN) -> dict[Comparison, Difference]:
    """Arm minus ``control``, by model."""
    by_arm: dict[tuple[str, str], dict[tuple[str, ...], Row]] = defaultdict(dict)
    for row in rows:
        model = "emoji" if _is_second(row) else "toy"
        by_arm[model, row["arm"]][row["images"], row["defect"], row["seed"]] = row
    found = {}
    for (model, arm), trials in by_arm.items():
        others = by_arm.get((model, control), {})
        for measure in measures:
            pairs = [(row.get(measure), others[key].get(measure)) for key, row in trials.items() if key in others]
            values = [(float(one), float(other)) for one, other in pairs if one and other]
            if arm != control and len(values) > 1:
                found[Comparison(model, arm, measure)] = difference(values, is_ratio=measure.startswith("validation"))
    return found


def surviving(compared: Mapping[Comparison, Difference], level: float = 0.05) -> set[Comparison]:
    """Those whose difference survives Holm's correction over all that were given."""
    if not compared:
        return set()
    rejected, *_ = multipletests([each.p for each in compared.values()], alpha=level, method="holm")
    return {comparison for comparison, survives in zip(compared, rejected, strict=True) if survives}


def tables(study: str, rows: Sequence[Row]) -> str:
    """Markdown: every arm's difference from plain MSE in the primary measures, the others, and from the controls."""
    primary, single = PRIMARY[study], [row for row in rows if row["defect"] in DEFECTS]
    rows = [row for row in rows if row["defect"] not in DEFECTS]
    compared, marked = judge(study, rows)
    judged = [value for each, value in compared.items() if each.arm not in _NOT_JUDGED]
    excluding = sum(value.p < 0.05 for value in judged)
    lines = [
        f"{len(rows)} trials, seeds {min(row['seed'] for row in rows)} to {max(row['seed'] for row in rows)}.",
        "",
        "Difference from plain MSE; `+` better and `-` worse where the 95% interval excludes 0, `++` and `--` where "
        f"the difference survives Holm's correction over all {len(judged)} primary comparisons. {excluding} intervals "
        f"exclude 0 ({len(judged) / 20:.0f} would by chance alone); {len(marked)} survive.",
        *_tables_by_model(compared, primary, marked),
    ]
    lines += _accuracies(rows) if study == "real_fake" else []
    others = _tables_by_model(differences(rows, SECONDARY), SECONDARY, set())
    lines += ["", "Other measures, without a correction:", *others] if others else []
    for control in CONTROLS[study]:
        table = _tables_by_model(differences(rows, primary, control), primary, set())
        lines += ["", f"Difference from {control}:", *table] if table else []
    for setting in (", guidance 1", ", strength 0.7"):
        names = {f"{name}{setting}": better for name, better in primary.items() if name != "validation"}
        table = _tables_by_model(differences(rows, names), names, set())
        lines += ["", f"Difference from plain MSE{setting}:", *table] if table else []
    for defect in DEFECTS if single else ():
        of_defect = differences([row for row in single if row["defect"] == defect], primary)
        lines += ["", f"Difference from plain MSE, {defect}:", *_tables_by_model(of_defect, primary, set())]
    return "\n".join(lines)


def difference(values: list[tuple[float, float]], *, is_ratio: bool) -> Difference:
    """Of pairs of a value and what it is compared with; see `Difference`."""
    ours, others = np.array(values).T
    differing = np.log(ours / others) if is_ratio else ours - others
    mean = float(differing.mean())
    if np.allclose(differing, mean, rtol=1e-9, atol=1e-12):  # Student's test is undefined without any spread
        half_width, p = 0.0, 1.0 if mean == 0 else 0.0
    else:
        test = stats.ttest_1samp(differing, 0.0)
        half_width, p = float(np.ptp(test.confidence_interval(0.95))) / 2, float(test.pvalue)
    if is_ratio:
        mean, half_width = math.expm1(mean), half_width * math.exp(mean)
    return Difference(mean, half_width, p, len(values))


def judge(study: str, rows: Sequence[Row]) -> tuple[dict[Comparison, Difference], set[Comparison]]:
    """The primary comparisons of a study, without single defects, and those that survive the correction."""
    compared = differences([row for row in rows if row["defect"] not in DEFECTS], PRIMARY[study])
    return compared, surviving({each: value for each, value in compared.items() if each.arm not in _NOT_JUDGED})


def _is_second(row: Row) -> bool:
    return row["images"] in _SECOND_MODEL


def _tables_by_model(
    compared: Mapping[Comparison, Difference], measures: Mapping[str, bool], marked: set[Comparison]
) -> list[str]:
    lines = []
    for model in ("toy", "emoji"):
        arms = list(dict.fromkeys(each.arm for each in compared if each.model == model))
        names = [name for name in measures if any((model, arm, name) in compared for arm in arms)]
        if not names:
            continue
        lines += ["", f"| {model} | pairs | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
        for arm in sorted(arms, key=order):
            cells = []
            for name in names:
                each = Comparison(model, arm, name)
                cells.append(_cell(compared[each], more_is_better=measures[name], survives=each in marked))
            pairs = compared[Comparison(model, arm, names[0])].pairs
            lines.append(f"| {arm} | {pairs} | {' | '.join(cells)} |")
    return lines


def _accuracies(rows: Sequence[Row]) -> list[str]:
    """A table of means and standard deviations over seeds, one line for each number of images per class."""
    by_arm: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_arm[row["arm"]][row["defect"]].append(float(row["accuracy"]))
    arms = sorted(by_arm, key=order)
    counts = sorted({count for of_count in by_arm.values() for count in of_count}, key=int)
    lines = ["", "Accuracy, mean and standard deviation over seeds:", ""]
    lines += [f"| images per class | {' | '.join(arms)} |", "|---" * (1 + len(arms)) + "|"]
    for count in counts:
        cells = [f"{np.mean(by_arm[arm][count]):.3f}, {np.std(by_arm[arm][count], ddof=1):.3f}" for arm in arms]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return lines


def _cell(value: Difference, *, more_is_better: bool, survives: bool) -> str:
    marks = sign(value, more_is_better=more_is_better) * (2 if survives else 1)
    return f"{value.mean:+.3f} ± {value.half_width:.3f} {marks}".rstrip()


def sign(value: Difference, *, more_is_better: bool) -> str:
    """``+`` better, ``-`` worse, and nothing where the interval has 0 in it."""
    if abs(value.mean) <= value.half_width or abs(value.mean) < 5e-4:
        return ""
    return "+" if (value.mean > 0) == more_is_better else "-"


def order(arm: str) -> int:
    """The place of an arm in tables and plots."""
    return [each.name for some in ARMS.values() for each in some].index(arm)
