"""Tables and plots of a study: means, 95% confidence intervals, and paired differences from plain MSE.

A pair is a seed and a style, trained in the arm and with plain MSE. The interval of the mean difference is Student's,
over all pairs. With as many comparisons as there are here, one in twenty intervals excludes 0 by chance alone; so the
tables also show which differences survive Holm's correction over all arms and main metrics.
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
from statsmodels.stats.multitest import multipletests

from freq_loss_plugin.analysis.figures import COLORS, new_figure
from freq_loss_plugin.toy_model.scenes import draw

PLAIN = "plain MSE"
# Metric to whether more is better; in this order in the tables. Fixed before the arms were compared.
MAIN = {
    "validation loss": False,
    "spectrum low": False,
    "spectrum high": False,
    "wasserstein low": False,
    "wasserstein high": False,
    "kernel distance": False,
    "structure": True,
    "texture": True,
    "style": True,
}
SECONDARY = {"L_low": False, "L_high": False, "memorization": True}
METRICS = {**MAIN, **SECONDARY}
# What fits on a page.
SUMMARY = ("validation loss", "spectrum low", "spectrum high", "kernel distance", "structure", "texture")
# Columns of the results file before the metrics, one of which is called style, too: key and type.
_TRIAL: dict[str, tuple[str, Any]] = {
    "arm": ("arm", str),
    "images": ("style", str),
    "seed": ("seed", int),
    "steps": ("steps", int),
    "gradient_ratio": ("gradient_ratio", float),
}
_EXPLANATION = (
    "Difference from plain MSE, both styles; `+` better and `-` worse where the 95% interval excludes 0, `++` and `--` "
    "where the difference survives Holm's correction:"
)
# Half a unit of the last digit shown: a smaller difference is not marked, whatever its interval.
_SMALLEST_MARKED = 5e-4


class Difference(NamedTuple):
    """A mean of paired differences, the half width of its 95% interval, and the p of Student's paired test."""

    mean: float
    half_width: float
    p: float

    def is_better(self, metric: str) -> bool | None:
        """Whether it improves the metric; None where the interval includes 0 or nothing of it would be shown."""
        if abs(self.mean) <= self.half_width or abs(self.mean) < _SMALLEST_MARKED:
            return None
        return (self.mean > 0) == METRICS[metric]


def differences(results: Iterable[dict[str, Any]]) -> dict[str, dict[str, Difference]]:
    """By arm and metric: arm minus plain MSE."""
    by_arm: dict[str, dict[tuple[str, int], dict[str, float]]] = defaultdict(dict)
    for trial in results:
        by_arm[trial["arm"]][trial["style"], trial["seed"]] = trial["metrics"]
    plain = by_arm[PLAIN]
    differing: dict[str, dict[str, Difference]] = {}
    for arm, trials in by_arm.items():
        pairs = [pair for pair in trials if pair in plain]
        if arm != PLAIN and pairs:
            differing[arm] = {
                metric: _difference([trials[pair][metric] - plain[pair][metric] for pair in pairs])
                for metric in METRICS
            }
    return differing


def _difference(values: list[float]) -> Difference:
    mean = float(np.mean(values))
    if len(values) < 2:
        return Difference(mean, math.inf, 1.0)
    if np.allclose(values, mean, rtol=1e-9, atol=1e-12):  # Student's test is undefined without any spread
        return Difference(mean, 0.0, 1.0 if mean == 0 else 0.0)
    test = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(0.95)
    return Difference(mean, float(high - low) / 2, float(test.pvalue))


def write(results: Iterable[dict[str, Any]], file: Path) -> None:
    """One line for each trial."""
    rows = [{**{column: trial[key] for column, (key, _) in _TRIAL.items()}, **trial["metrics"]} for trial in results]
    with file.open("w", newline="", encoding="utf-8") as target:
        writer = csv.DictWriter(target, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )


def read(file: Path) -> list[dict[str, Any]]:
    """What `write` wrote."""
    with file.open(newline="", encoding="utf-8") as source:
        rows = list(csv.DictReader(source))
    return [
        {
            **{key: kind(row[column]) for column, (key, kind) in _TRIAL.items()},
            "metrics": {name: float(value) for name, value in row.items() if name not in _TRIAL},
        }
        for row in rows
    ]


def surviving(differing: dict[str, dict[str, Difference]], level: float = 0.05) -> set[tuple[str, str]]:
    """(arm, metric) whose difference survives Holm's correction over all arms and main metrics."""
    tests = [(arm, metric) for arm in differing for metric in MAIN]
    if not tests:
        return set()
    rejected, *_ = multipletests([differing[arm][metric].p for arm, metric in tests], alpha=level, method="holm")
    return {test for test, survives in zip(tests, rejected, strict=True) if survives}


def summary(results: list[dict[str, Any]]) -> str:
    """Markdown: the differences of every arm in some main metrics."""
    differing = differences(results)
    marked = surviving(differing)
    lines = [_row("arm", SUMMARY), _rule(1 + len(SUMMARY))]
    for arm, by_metric in differing.items():
        lines.append(_row(arm, [_cell(by_metric[name], name, (arm, name) in marked) for name in SUMMARY]))
    return "\n".join(lines)


def tables(results: list[dict[str, Any]]) -> str:
    """Markdown: plain MSE's means by style, every arm's differences over all and by style, and what survives."""
    styles = sorted({trial["style"] for trial in results})
    differing = differences(results)
    marked = surviving(differing)
    lines = [
        f"{len(results)} trials: {len({trial['arm'] for trial in results})} arms, "
        f"seeds {sorted({trial['seed'] for trial in results})}, styles {', '.join(styles)}, "
        f"{results[0]['steps']} steps.",
        "",
        *_plain_table(results, styles),
        *_difference_table(results, _EXPLANATION, marked),
    ]
    for style in styles:
        of_style = [trial for trial in results if trial["style"] == style]
        lines += _difference_table(of_style, f"The same, {style} alone:", set())
    tested = len(differing) * len(MAIN)
    significant = sum(by_metric[name].p < 0.05 for by_metric in differing.values() for name in MAIN)
    lines += [
        "",
        f"{significant} of {tested} intervals of main metrics exclude 0 ({tested / 20:.0f} would by chance alone); "
        f"after Holm's correction: {len(marked)}.",
    ]
    return "\n".join(lines)


def _plain_table(results: list[dict[str, Any]], styles: list[str]) -> list[str]:
    lines = [_row(f"{PLAIN}: mean ± 95%", METRICS), _rule(1 + len(METRICS))]
    for style in styles:
        chosen = [trial["metrics"] for trial in results if trial["arm"] == PLAIN and trial["style"] == style]
        means = [_difference([measured[metric] for measured in chosen]) for metric in METRICS]
        lines.append(_row(style, [f"{value.mean:.3f} ± {value.half_width:.3f}" for value in means]))
    return lines


def _difference_table(results: list[dict[str, Any]], title: str, marked: set[tuple[str, str]]) -> list[str]:
    lines = ["", title, "", _row("arm", ("gradient ratio", *METRICS)), _rule(2 + len(METRICS))]
    for arm, by_metric in differences(results).items():
        ratio = np.mean([trial["gradient_ratio"] for trial in results if trial["arm"] == arm])
        cells = [_cell(difference, name, (arm, name) in marked) for name, difference in by_metric.items()]
        lines.append(_row(arm, (f"{ratio:.1%}", *cells)))
    return lines


def _cell(difference: Difference, metric: str, survives: bool) -> str:
    better = difference.is_better(metric)
    mark = "" if better is None else " " + ("+" if better else "-") * (2 if survives else 1)
    return f"{difference.mean:+.3f} ± {difference.half_width:.3f}{mark}"


def _row(first: str, cells: Iterable[str]) -> str:
    return f"| {' | '.join((first, *cells))} |"


def _rule(columns: int) -> str:
    return "|---" * columns + "|"


def forest(results: list[dict[str, Any]], file: Path) -> None:
    """A forest plot: one panel for each main metric, one line for each arm, the interval of its difference."""
    differing = differences(results)
    arms = list(differing)[::-1]
    columns = 3
    rows = -(-len(MAIN) // columns)
    figure = new_figure(1500, 90 + rows * (60 + 19 * len(arms)), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis, (metric, more_is_better) in zip(axes.flat, MAIN.items(), strict=False):
        for place, arm in enumerate(arms):
            value = differing[arm][metric]
            color = {None: COLORS[1], True: COLORS[3], False: COLORS[2]}[value.is_better(metric)]
            axis.errorbar(value.mean, place, xerr=value.half_width, fmt="o", color=color, markersize=4, linewidth=1.5)
        axis.axvline(0, color=COLORS[0], linewidth=0.8)
        axis.set_title(f"{metric} ({'more' if more_is_better else 'less'} is better)", fontsize=10)
        axis.set_yticks(range(len(arms)), arms, fontsize=8)
        axis.locator_params(axis="x", nbins=5)
        axis.tick_params(axis="x", labelsize=8)
    figure.suptitle(
        "difference from plain MSE, mean and 95% interval over pairs of seed and style: "
        "blue better, orange worse, gray neither",
        fontsize=10,
    )
    figure.savefig(file)


def images(results: list[dict[str, Any]], folder: Path, arms: list[str], file: Path, count: int = 6) -> None:
    """The first samples of some arms, with the first seed, for each style, below the scenes of the prompts."""
    from trial import Trial, reference_of  # here, because it loads diffusers, which reading results does not need

    styles = sorted({trial["style"] for trial in results})
    seed = min(trial["seed"] for trial in results)
    figure = new_figure(1500, 122 * (len(arms) + 1), dpi=100, layout="constrained")
    axes = figure.subplots(len(arms) + 1, len(styles) * count, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for place, style in enumerate(styles):
        rows = [[draw(scene, style) for scene in reference_of(style, folder).scenes[:count]]]
        for arm in arms:
            samples = np.load(folder / f"{Trial(arm, seed, style, 0).name}.npy")
            rows.append(list(samples[:count].transpose(0, 2, 3, 1)))
        for line, shown in enumerate(rows):
            for column, image in enumerate(shown):
                axes[line, place * count + column].imshow(image)
    for line, name in enumerate(["as drawn for the prompt", *arms]):
        label = name.replace(", ", ",\n").replace(" (", "\n(")
        axes[line, 0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    figure.savefig(file)
