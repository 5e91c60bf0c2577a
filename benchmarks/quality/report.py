"""Tables and plots of a study: means, 95% confidence intervals, and paired differences against plain MSE.

A pair is a seed and a style, trained in the arm and with plain MSE. The interval of the mean difference is Student's,
over all pairs. With as many comparisons as there are here, one in twenty intervals misses 0 by chance alone; so the
table also says how many differences survive Holm's correction over all arms and main measures.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from freq_loss_plugin.drawing import COLOURS, new_figure

PLAIN = "plain MSE"
# Name to whether more is better; in this order in the tables. Fixed before the arms were compared.
MAIN = {
    "held-out loss": False,
    "spectrum low": False,
    "spectrum high": False,
    "wasserstein low": False,
    "wasserstein high": False,
    "kernel distance": False,
    "structure": True,
    "texture": True,
    "style": True,
}
BESIDES = {"L_low": False, "L_high": False, "memorisation": True}
# What fits on a page.
SUMMARY = ("held-out loss", "spectrum low", "spectrum high", "kernel distance", "structure", "texture")
# Columns of the file of results before the measures, one of which is called style, too: key and kind.
_TRIAL: dict[str, tuple[str, Any]] = {
    "arm": ("arm", str),
    "pictures": ("style", str),
    "seed": ("seed", int),
    "steps": ("steps", int),
    "mean_share": ("mean_share", float),
}


_BOTH = "both styles"
_EXPLANATION = (
    "Difference to plain MSE, both styles; `+` better and `-` worse where the 95% interval excludes 0, `++` and `--` "
    "where Holm's correction agrees:"
)
# Half of what the tables show; a difference below it is one of rounding, or might as well be.
_SHOWN = 5e-4


class Difference(NamedTuple):
    """A mean of paired differences, the half width of its 95% interval, and the p of Student's paired test."""

    mean: float
    half_width: float
    p: float


def differences(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, Difference]]:
    """By arm and measure: arm minus plain MSE."""
    by_arm: dict[str, dict[tuple[str, int], dict[str, float]]] = defaultdict(dict)
    for each in results:
        by_arm[each["arm"]][each["style"], each["seed"]] = each["metrics"]
    plain = by_arm[PLAIN]
    found: dict[str, dict[str, Difference]] = {}
    for arm, trials in by_arm.items():
        pairs = [pair for pair in trials if pair in plain]
        if arm == PLAIN or not pairs:
            continue
        found[arm] = {}
        for measure in (*MAIN, *BESIDES):
            values = np.array([trials[pair][measure] - plain[pair][measure] for pair in pairs])
            found[arm][measure] = _difference(values)
    return found


def _difference(values: np.ndarray) -> Difference:
    if len(values) < 2:
        return Difference(float(values.mean()), math.inf, 1.0)
    error = values.std(ddof=1) / math.sqrt(len(values))
    if error == 0:
        return Difference(float(values.mean()), 0.0, 1.0 if values.mean() == 0 else 0.0)
    freedom = len(values) - 1
    p = 2 * stats.t.sf(abs(values.mean()) / error, freedom)
    return Difference(float(values.mean()), float(stats.t.ppf(0.975, freedom) * error), float(p))


def write(results: Iterable[dict[str, Any]], file: Path) -> None:
    """One line for each trial."""
    rows = [{**{column: each[key] for column, (key, _) in _TRIAL.items()}, **each["metrics"]} for each in results]
    with open(file, "w", newline="", encoding="utf-8") as target:
        writer = csv.DictWriter(target, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )


def read(file: Path) -> list[dict[str, Any]]:
    """What `write` wrote."""
    with open(file, newline="", encoding="utf-8") as source:
        rows = list(csv.DictReader(source))
    return [
        {
            **{key: kind(row[column]) for column, (key, kind) in _TRIAL.items()},
            "metrics": {name: float(value) for name, value in row.items() if name not in _TRIAL},
        }
        for row in rows
    ]


def holm(found: dict[str, dict[str, Difference]], level: float = 0.05) -> set[tuple[str, str]]:
    """(arm, measure) whose difference survives Holm's correction over all of them."""
    tests = sorted((found[arm][measure].p, arm, measure) for arm in found for measure in MAIN)
    surviving = set()
    for rank, (p, arm, measure) in enumerate(tests):
        if p > level / (len(tests) - rank):
            break
        surviving.add((arm, measure))
    return surviving


def summary(results: list[dict[str, Any]]) -> str:
    """Markdown: the differences of every arm in some main measures."""
    found = differences(results)
    surviving = holm(found)
    lines = [_row("arm", SUMMARY), _rule(1 + len(SUMMARY))]
    for arm, measures in found.items():
        lines.append(_row(arm, [_cell(measures[name], name, (arm, name) in surviving) for name in SUMMARY]))
    return "\n".join(lines)


def tables(results: list[dict[str, Any]]) -> str:
    """Markdown: plain MSE's means by style, every arm's differences, the count of what survives, and by style."""
    styles = sorted({each["style"] for each in results})
    found = differences(results)
    surviving = holm(found)
    lines = [
        f"{len(results)} trials: {len({each['arm'] for each in results})} arms, "
        f"seeds {sorted({each['seed'] for each in results})}, styles {', '.join(styles)}, "
        f"{results[0]['steps']} steps.",
        "",
        _row(f"{PLAIN}: mean ± 95%", (*MAIN, *BESIDES)),
        _rule(1 + len(MAIN) + len(BESIDES)),
    ]
    for style in styles:
        chosen = [each["metrics"] for each in results if each["arm"] == PLAIN and each["style"] == style]
        lines.append(_row(style, [_mean([each[measure] for each in chosen]) for measure in (*MAIN, *BESIDES)]))
    parts = {_BOTH: results}
    parts |= {style: [each for each in results if each["style"] == style] for style in styles}
    for title, chosen in parts.items():
        by_arm = differences(chosen)
        lines += [
            "",
            _EXPLANATION if title == _BOTH else f"The same, {title} alone:",
            "",
            _row("arm", ("share", *MAIN, *BESIDES)),
            _rule(2 + len(MAIN) + len(BESIDES)),
        ]
        for arm, measures in by_arm.items():
            marks = surviving if title == _BOTH else set()
            cells = [_cell(each, name, (arm, name) in marks) for name, each in measures.items()]
            share = np.mean([each["mean_share"] for each in chosen if each["arm"] == arm])
            lines.append(_row(arm, (f"{share:.1%}", *cells)))
    tested = len(found) * len(MAIN)
    by_chance = sum(each[measure].p < 0.05 for each in found.values() for measure in MAIN)
    lines += [
        "",
        f"{by_chance} of {tested} intervals of main measures exclude 0 (5%, {tested / 20:.0f}, would by chance alone); "
        f"{len(surviving)} survive Holm's correction.",
    ]
    return "\n".join(lines)


def _cell(each: Difference, measure: str, survives: bool) -> str:
    mark = ""
    if abs(each.mean) > each.half_width and abs(each.mean) >= _SHOWN:
        better = (each.mean > 0) == {**MAIN, **BESIDES}[measure]
        mark = " " + ("+" if better else "-") * (2 if survives else 1)
    return f"{each.mean:+.3f} ± {each.half_width:.3f}{mark}"


def _mean(values: list[float]) -> str:
    each = _difference(np.array(values))
    return f"{each.mean:.3f} ± {each.half_width:.3f}"


def _row(first: str, cells: Iterable[str]) -> str:
    return f"| {' | '.join((first, *cells))} |"


def _rule(columns: int) -> str:
    return "|---" * columns + "|"


def forest(results: list[dict[str, Any]], file: Path) -> None:
    """A forest plot: one panel for each main measure, one line for each arm, the interval of its difference."""
    found = differences(results)
    arms = list(found)[::-1]
    columns = 3
    rows = -(-len(MAIN) // columns)
    figure = new_figure(1500, 90 + rows * (60 + 19 * len(arms)), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis, (measure, more_is_better) in zip(axes.flat, MAIN.items(), strict=False):
        for place, arm in enumerate(arms):
            each = found[arm][measure]
            clear = abs(each.mean) > each.half_width and abs(each.mean) >= _SHOWN
            colour = COLOURS[1]
            if clear:
                colour = COLOURS[3] if (each.mean > 0) == more_is_better else COLOURS[2]
            axis.errorbar(each.mean, place, xerr=each.half_width, fmt="o", color=colour, markersize=4, linewidth=1.5)
        axis.axvline(0, color=COLOURS[0], linewidth=0.8)
        axis.set_title(f"{measure} ({'more' if more_is_better else 'less'} is better)", fontsize=10)
        axis.set_yticks(range(len(arms)), arms, fontsize=8)
        axis.locator_params(axis="x", nbins=5)
        axis.tick_params(axis="x", labelsize=8)
    figure.suptitle(
        "difference to plain MSE, mean and 95% interval over pairs of seed and style: "
        "blue better, orange worse, grey neither",
        fontsize=10,
    )
    figure.savefig(file)


def pictures(results: list[dict[str, Any]], folder: Path, arms: list[str], file: Path, count: int = 6) -> None:
    """A sheet: the first samples of some arms, with the first seed, for each style."""
    from trial import Trial, reference_of

    styles = sorted({each["style"] for each in results})
    seed = min(each["seed"] for each in results)
    figure = new_figure(1500, 122 * (len(arms) + 1), dpi=100, layout="constrained")
    axes = figure.subplots(len(arms) + 1, len(styles) * count, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    from freq_loss_plugin.embedded.pictures import draw

    for place, style in enumerate(styles):
        drawn = [draw(scene, style) for scene in reference_of(style, folder).scenes[:count]]
        rows = [drawn]
        for arm in arms:
            samples = np.load(folder / f"{Trial(arm, seed, style, 0).name}.npy")
            rows.append(list(samples[:count].transpose(0, 2, 3, 1)))
        for line, shown in enumerate(rows):
            for column, picture in enumerate(shown):
                axes[line, place * count + column].imshow(picture)
    for line, name in enumerate(["as drawn for the prompt", *arms]):
        axes[line, 0].set_ylabel(
            name.replace(", ", ",\n").replace(" (", "\n("), fontsize=8, rotation=0, ha="right", va="center"
        )
    figure.savefig(file)
