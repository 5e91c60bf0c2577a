"""What can be restored of a defect, and the least timestep of what remains, for models whose VAE is not at hand.

The table ``published.csv`` is written by ``python benchmarks/real_latents.py PHOTOS --publish``: photographs, each
defect made on them, both encoded by tiny autoencoders that are distilled from those of the models, and the filter of
`freq_loss_plugin.image_quality.restoration` fitted. A run with the VAE of the model and its own images finds other
numbers: these are a preview.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..loss.latents import PredictionType
from ..options.config import FreqLossConfig
from .defects import Defect
from .noise_schedules import signal_to_noise, stable_diffusion_alphas

FILE = Path(__file__).with_name("published.csv")
# The table has a column of least timesteps for each of these fractions, see `restoration.least_timestep`.
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
COLUMNS = ("model", "defect", "level", "restored", *map(str, FRACTIONS))
# Kinds of defects and the levels in the table, mildest first.
LEVELS: Mapping[str, tuple[float, ...]] = {
    "resolution": (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8),
    "jpeg": (90, 80, 70, 60, 50, 40, 30, 20, 10),
    "noise": (5, 10, 20, 40),
}


class Model(NamedTuple):
    """Models of one latent space.

    Attributes:
        title: their name.
        prediction_type: see `freq_loss_plugin.loss.latents`.
        channels: of the latents.
    """

    title: str
    prediction_type: PredictionType
    channels: int

    @property
    def snr(self) -> Tensor:
        """SNR at the timesteps 0..999, shape (1000,)."""
        is_flow = self.prediction_type == "flow"
        return signal_to_noise(self.prediction_type, None if is_flow else stable_diffusion_alphas())


MODELS: Mapping[str, Model] = {
    "sd15": Model("SD1.5", "epsilon", 4),
    "sdxl": Model("SDXL", "epsilon", 4),
    "sd3": Model("SD3", "flow", 16),
    "flux1": Model("FLUX.1", "flow", 16),
    "flux2": Model("FLUX.2", "flow", 32),
}
DEFAULT_MODEL = "sdxl"


def lookup(model: str, defect: Defect, fraction: float = FreqLossConfig.image_quality_threshold) -> tuple[float, int]:
    """The fraction of the squared error in the latents that can be taken back, and the least timestep of what remains.

    Between the levels of the table both are interpolated, along log(resolution), JPEG quality, log(noise) and
    log(fraction). Towards no defect (noise: standard deviation 1) both go to 0; a defect beyond the worst level counts
    as that. An image with several defects has the least of the fractions and the highest of the timesteps. JPEG counts
    as if it were made at the size at which the image is trained.

    Args:
        model: one of `MODELS`.
        defect: what is wrong with the image.
        fraction: see `freq_loss_plugin.image_quality.restoration.least_timestep`; within `FRACTIONS`, else the nearest.
    """
    levels = {
        "resolution": defect.resolution,
        "jpeg": 100 if defect.jpeg is None else defect.jpeg,
        "noise": max(defect.noise, 1.0),
    }
    severities = {kind: _severity(kind, level) for kind, level in levels.items()}
    found = [_at(_table()[model, kind], severity, fraction) for kind, severity in severities.items() if severity > 0]
    if not found:
        return 0.0, 0
    return min(restored for restored, _ in found), max(round(least) for _, least in found)


def defect_of(kind: str, level: Any) -> Defect:
    """The defect of one of `LEVELS`."""
    return Defect(**{kind: level})


def markdown_table() -> str:
    """The table at the default fraction, for the documentation."""
    lines = [f"| | {' | '.join(model.title for model in MODELS.values())} |", "|---" * (len(MODELS) + 1) + "|"]
    for defect in (defect_of(kind, level) for kind, levels in LEVELS.items() for level in levels):
        found = [lookup(model, defect) for model in MODELS]
        lines.append(f"| {defect} | {' | '.join(f'{restored:.0%}, {least}' for restored, least in found)} |")
    return "\n".join(lines)


def _at(rows: np.ndarray, severity: float, fraction: float) -> tuple[float, float]:
    """Both values at a severity; each row has a severity, the restored fraction, and a timestep for each fraction."""
    restored, *floors = (float(np.interp(severity, rows[:, 0], column)) for column in rows[:, 1:].T)
    return restored, float(np.interp(math.log(fraction), np.log(FRACTIONS), floors))


def _severity(kind: str, level: float) -> float:
    """0 for no defect, more for a worse one."""
    return 100 - level if kind == "jpeg" else math.log2(level if kind == "noise" else 1 / level)


@functools.cache
def _table() -> dict[tuple[str, str], np.ndarray]:
    """For each model and kind of defect the rows for `_at`, the first one for no defect."""
    nothing = [0.0] * (2 + len(FRACTIONS))
    rows: dict[tuple[str, str], list[list[float]]] = {}
    with FILE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            model, kind, level, *numbers = (row[column] for column in COLUMNS)
            values = [_severity(kind, float(level)), *map(float, numbers)]
            rows.setdefault((model, kind), [nothing]).append(values)
    return {key: np.array(sorted(values)) for key, values in rows.items()}
