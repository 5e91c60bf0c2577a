"""Tables and plots of the studies: paired differences, 95% intervals, Holm's correction. See plan.md.

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

from freq_loss_plugin.analysis.figures import COLORS, new_figure

from .arms import ARMS, PLAIN, REAL, SHAM
from .images import DEFECTS, MIXTURE

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
# The arms and measures of the plot in the README.
TITLES = {"balance": "sharp images", "imperfect": "mostly imperfect images"}
MAIN = {
    "balance": ("twice the steps", "debiased estimation", "balance by timestep", "distribution term, 10%"),
    "imperfect": (*CONTROLS["imperfect"], "image quality", "image quality, balance by band"),
}
MAIN_MEASURES = PRIMARY["balance"] | PRIMARY["imperfect"]
del MAIN_MEASURES["background"], MAIN_MEASURES["color error"]
_MODELS = {"toy": "toy, epsilon", "emoji": "emoji, flow"}
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
                found[Comparison(model, arm, measure)] = _difference(values, is_ratio=measure.startswith("validation"))
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
    compared, marked = _judged(study, rows)
    judged = [value for each, value in compared.items() if each.arm != SHAM]
    excluding = sum(value.p < 0.05 for value in judged)
    lines = [
        f"{len(rows)} trials, seeds {min(row['seed'] for row in rows)} to {max(row['seed'] for row in rows)}.",
        "",
        "Difference from plain MSE; `+` better and `-` worse where the 95% interval excludes 0, `++` and `--` where "
        f"the difference survives Holm's correction over all {len(judged)} primary comparisons. {excluding} intervals "
        f"exclude 0 ({len(judged) / 20:.0f} would by chance alone); {len(marked)} survive.",
        *_tables_by_model(compared, primary, marked),
    ]
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


def write(results: Path, samples: Path) -> None:
    """Tables and plots of the studies that have results, and a plot of the main arms of all."""
    found = {study: rows for study in PRIMARY if (rows := read(results / f"{study}.csv"))}
    for study, rows in found.items():
        (results / f"{study}.md").write_text(tables(study, rows) + "\n", encoding="utf-8")
        _forest({study: ()}, results, PRIMARY[study], results / f"{study}.png")
        _sheet(study, rows, samples, results / f"{study}_samples.jpg")
    if MAIN.keys() <= found.keys():
        _forest(MAIN, results, MAIN_MEASURES, results / "main.png")


def _judged(study: str, rows: Sequence[Row]) -> tuple[dict[Comparison, Difference], set[Comparison]]:
    """The primary comparisons of a study, without single defects, and those that survive the correction."""
    compared = differences([row for row in rows if row["defect"] not in DEFECTS], PRIMARY[study])
    return compared, surviving({each: value for each, value in compared.items() if each.arm != SHAM})


def _difference(values: list[tuple[float, float]], *, is_ratio: bool) -> Difference:
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
        for arm in sorted(arms, key=_order):
            cells = []
            for name in names:
                each = Comparison(model, arm, name)
                cells.append(_cell(compared[each], more_is_better=measures[name], survives=each in marked))
            pairs = compared[Comparison(model, arm, names[0])].pairs
            lines.append(f"| {arm} | {pairs} | {' | '.join(cells)} |")
    return lines


def _cell(value: Difference, *, more_is_better: bool, survives: bool) -> str:
    sign = _sign(value, more_is_better=more_is_better) * (2 if survives else 1)
    return f"{value.mean:+.3f} ± {value.half_width:.3f} {sign}".rstrip()


def _sign(value: Difference, *, more_is_better: bool) -> str:
    if abs(value.mean) <= value.half_width or abs(value.mean) < 5e-4:
        return ""
    return "+" if (value.mean > 0) == more_is_better else "-"


def _order(arm: str) -> int:
    return [each.name for some in ARMS.values() for each in some].index(arm)


def _forest(studies: dict[str, tuple[str, ...]], results: Path, measures: Mapping[str, bool], file: Path) -> None:
    """One panel for each measure, one line for each arm and model, the interval of its difference.

    Args:
        studies: those that are shown, each with its arms; all that it has, if there are none.
        measures: name to whether more is better; shown are those that are primary ones of a study.
    """
    lines: list[tuple[str, dict[str, tuple[Difference, bool]]]] = []
    for study, arms in reversed(studies.items()):
        compared, marked = _judged(study, read(results / f"{study}.csv"))
        for arm in sorted(arms or {each.arm for each in compared}, key=_order, reverse=True):
            for model in ("emoji", "toy"):
                of_arm = {
                    each.measure: (value, each in marked)
                    for each, value in compared.items()
                    if (each.model, each.arm) == (model, arm)
                }
                lines += [(f"{arm} ({_MODELS[model]})", of_arm)] if of_arm else []
        lines += [(f"{TITLES[study]}:", {})] if len(studies) > 1 else []
    columns = min(3, len(measures))
    panels = -(-len(measures) // columns)
    figure = new_figure(500 * columns, 90 + panels * (60 + 19 * len(lines)), dpi=100, layout="constrained")
    axes = figure.subplots(panels, columns, sharey=True, squeeze=False)
    for axis, (measure, more_is_better) in zip(axes.flat, measures.items(), strict=True):
        for place, (_, of_arm) in enumerate(lines):
            if measure in of_arm:
                value, survives = of_arm[measure]
                color = {"": COLORS[1], "+": COLORS[3], "-": COLORS[2]}[_sign(value, more_is_better=more_is_better)]
                face = color if survives else "white"
                axis.errorbar(value.mean, place, xerr=value.half_width, color=color, fmt="o", mfc=face, markersize=5)
        axis.axvline(0, color=COLORS[0], linewidth=0.8)
        axis.set_ylim(-0.7, len(lines) - 0.3)
        axis.set_title(f"{measure} ({'more' if more_is_better else 'less'} is better)", fontsize=10)
        axis.set_yticks(range(len(lines)), [label for label, _ in lines], fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
    figure.suptitle(
        "difference from plain MSE, mean and 95% interval: blue better, orange worse, gray neither; "
        "filled: survives the correction",
        size=10,
    )
    figure.savefig(file)


def _sheet(study: str, rows: Sequence[Row], folder: Path, file: Path, count: int = 6) -> None:
    """The first samples of every arm, with the first seed, for each style; where they have been kept."""
    shown = {
        (row["arm"], row["images"]): folder / f"{study}-{'-'.join(row[name] for name in KEY).replace(' ', '_')}.npy"
        for row in sorted(rows, key=lambda row: int(row["seed"]), reverse=True)
        if row["defect"] in ("none", MIXTURE)
    }
    shown = {key: samples for key, samples in shown.items() if samples.is_file() and key[0] != SHAM}
    if not shown:
        return
    arms = sorted({arm for arm, _ in shown}, key=_order)
    styles = list(dict.fromkeys(style for _, style in shown))
    figure = new_figure(260 + 100 * count * len(styles), 104 * len(arms), dpi=100, layout="constrained")
    axes = figure.subplots(len(arms), count * len(styles), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, arm in enumerate(arms):
        for place, style in enumerate(styles):
            if (arm, style) in shown:
                for column, image in enumerate(np.load(shown[arm, style])[:count]):
                    axes[line, place * count + column].imshow(image.transpose(1, 2, 0))
        axes[line, 0].set_title(arm, fontsize=8, loc="left")
    figure.savefig(file)
