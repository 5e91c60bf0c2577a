"""The arms: which images train, what is done to the latents of imperfect ones, and from which timestep on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PLAIN, SHARP_ALONE, ALL_SHARP = "plain MSE", "sharp alone", "all sharp"
FRACTIONS = (0.02, 0.05, 0.15)
MIDDLE = FRACTIONS[1]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: as in the tables.
        images: all of them; those without a defect; or all, none of which has one.
        repair: of imperfect latents: nothing, their channel means alone, or a matrix per frequency, fitted on the sharp
            images of the cell; or the same fitted as in runs, on some of these and on synthetic ones.
        floor: of imperfect images: None for none; "d'" for the rule of detectability; or a fraction of a denoiser's own
            error, which what remains of the defect may not exceed.
        weighted: whether each noise level gets back the share of updates that floors take from it.
    """

    name: str
    images: Literal["all", "sharp alone", "all sharp"] = "all"
    repair: Literal["nothing", "means", "restored", "as in runs"] = "nothing"
    floor: float | Literal["d'"] | None = None
    weighted: bool = False


def _both(name: str, **properties: object) -> tuple[Arm, Arm]:
    """With and without weights."""
    return Arm(name, **properties), Arm(f"{name}, weighted", weighted=True, **properties)  # type: ignore[arg-type]


ARMS = (
    Arm(PLAIN),
    Arm(SHARP_ALONE, images="sharp alone"),
    *_both("d'² < 16", floor="d'"),
    *_both("gated at 5%", floor=MIDDLE),
    Arm("means moved", repair="means"),
    *_both("means moved, gated at 5%", repair="means", floor=MIDDLE),
    Arm("restored", repair="restored"),
    *(arm for each in FRACTIONS for arm in _both(f"restored, gated at {each:.0%}", repair="restored", floor=each)),
    Arm("as in runs, gated at 5%, weighted", repair="as in runs", floor=MIDDLE, weighted=True),
    Arm(ALL_SHARP, images="all sharp"),
)
BY_NAME = {arm.name: arm for arm in ARMS}
