"""Plots of the studies: differences with their intervals, and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from freq_loss_plugin.analysis.figures import COLORS, new_figure

from .arms import SHAM
from .images import MIXTURE
from .report import CONTROLS, KEY, PRIMARY, Difference, Row, judge, order, read, samples_name, sign

# The studies that have plots, then the arms and measures of the plot in the README.
TITLES = {"balance": "sharp images", "imperfect": "mostly imperfect images"}
MAIN = {
    "balance": ("twice the steps", "debiased estimation", "balance by timestep", "distribution term, 10%"),
    "imperfect": (*CONTROLS["imperfect"], "image quality", "image quality, balance by band"),
}
MAIN_MEASURES = PRIMARY["balance"] | PRIMARY["imperfect"]
del MAIN_MEASURES["background"], MAIN_MEASURES["color error"]
# A label, and by measure a difference and whether it survives the correction; from the bottom up.
_Line = tuple[str, dict[str, tuple[Difference, bool]]]
_MODELS = {"toy": "toy, epsilon", "emoji": "emoji, flow"}


def forest(studies: dict[str, tuple[str, ...]], results: Path, measures: Mapping[str, bool], file: Path) -> None:
    """One panel for each measure, one line for each arm and model, the interval of its difference.

    Args:
        studies: those that are shown, each with its arms; all that it has, if there are none.
        measures: name to whether more is better; shown are those that are primary ones of a study.
    """
    lines = _lines(studies, results)
    columns = min(3, len(measures))
    panels = -(-len(measures) // columns)
    figure = new_figure(500 * columns, 90 + panels * (60 + 19 * len(lines)), dpi=100, layout="constrained")
    axes = figure.subplots(panels, columns, sharey=True, squeeze=False)
    for axis, (measure, more_is_better) in zip(axes.flat, measures.items(), strict=True):
        for place, (_, of_arm) in enumerate(lines):
            if measure in of_arm:
                value, survives = of_arm[measure]
                color = {"": COLORS[1], "+": COLORS[3], "-": COLORS[2]}[sign(value, more_is_better=more_is_better)]
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


def _lines(studies: dict[str, tuple[str, ...]], results: Path) -> list[_Line]:
    lines: list[_Line] = []
    for study, arms in reversed(studies.items()):
        compared, marked = judge(study, read(results / f"{study}.csv"))
        for arm in sorted(arms or {each.arm for each in compared}, key=order, reverse=True):
            for model in ("emoji", "toy"):
                of_arm = {
                    each.measure: (value, each in marked)
                    for each, value in compared.items()
                    if (each.model, each.arm) == (model, arm)
                }
                lines += [(f"{arm} ({_MODELS[model]})", of_arm)] if of_arm else []
        lines += [(f"{TITLES[study]}:", {})] if len(studies) > 1 else []
    return lines


def sheet(study: str, rows: Sequence[Row], folder: Path, file: Path, count: int = 6) -> None:
    """The first samples of every arm, with the first seed, for each style; where they have been kept."""
    shown = {
        (row["arm"], row["images"]): folder / samples_name(study, [row[name] for name in KEY])
        for row in sorted(rows, key=lambda row: int(row["seed"]), reverse=True)
        if row["defect"] in ("none", MIXTURE)
    }
    shown = {key: samples for key, samples in shown.items() if samples.is_file() and key[0] != SHAM}
    if not shown:
        return
    arms = sorted({arm for arm, _ in shown}, key=order)
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
