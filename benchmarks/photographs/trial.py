"""A trial: a LoRA trained in one arm of a cell, and what is measured of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from . import measures
from .arms import BY_NAME
from .cell import Cell, prepare
from .images import NO_DEFECT
from .training import Settings, Training, new_lora
from .worlds import WORLDS

STEPS = 250
KEY = ("world", "style", "defect", "fraction", "seed", "arm", "rate")
COLUMNS = (*KEY, "least timesteps", *measures.NAMES, "seconds")


@dataclass(frozen=True)
class Trial:
    """What is trained.

    Attributes:
        cell: on what.
        arm: the name of one of `arms.ARMS`.
        rate: the peak learning rate.
    """

    cell: Cell
    arm: str
    rate: float

    @property
    def key(self) -> tuple[str, ...]:
        """As in the results file."""
        cell = self.cell
        return cell.world, cell.style, cell.defect, f"{cell.fraction:g}", str(cell.seed), self.arm, f"{self.rate:g}"


def trial_of(cell: Cell, arm: str, rate: float) -> Trial:
    """Arms without imperfect images are trained once, and count for all defects."""
    images = BY_NAME[arm].images
    if images == "all sharp":
        cell = Cell(cell.world, cell.style, NO_DEFECT, 0.0, cell.seed)
    elif images == "sharp alone":
        cell = Cell(cell.world, cell.style, NO_DEFECT, cell.fraction, cell.seed)
    return Trial(cell, arm, rate)


def run(trial: Trial, *, steps: int = STEPS, samples: bool = True) -> dict[str, Any]:
    """Train and measure; returns a row of the results file.

    Args:
        trial: what is trained.
        steps: optimizer steps.
        samples: whether samples are drawn and judged, too.
    """
    cell, arm, world = trial.cell, BY_NAME[trial.arm], WORLDS[trial.cell.world]
    start = time.perf_counter()
    latents, least = prepare(cell).trained(arm, world.snr)
    model = new_lora(world, cell.seed)
    settings = Settings(cell.seed, steps, trial.rate, arm.is_weighted(flow=world.flow), arm.config)
    Training(world, model, latents, least, settings).run()
    measured = measures.validate(world, model, cell.style, cell.seed)
    if samples:
        measured |= measures.judge(world, model, cell.style, cell.seed)
    row = dict(zip(KEY, trial.key, strict=True))
    row["least timesteps"] = " ".join(f"{each:.0f}" for each in sorted(set(least.tolist())) if each)
    row |= {name: f"{value:.5g}" for name, value in measured.items()}
    return row | {"seconds": f"{time.perf_counter() - start:.1f}"}
