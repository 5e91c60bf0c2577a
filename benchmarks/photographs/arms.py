"""The arms: which images train, what is done to the latents of imperfect ones, and from which timestep on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from freq_loss_plugin import FreqLossConfig

PLAIN, SHARP_ALONE, ALL_SHARP, AS_IN_RUNS = "plain MSE", "sharp alone", "all sharp", "as in runs"
WITH_TERM = "all sharp, with the term"
OFF = FreqLossConfig(dist_match=0.0)
# The product's own fraction, and others that a pilot compared.
FRACTION = FreqLossConfig.image_quality_threshold
PILOT_FRACTIONS = (0.02, 0.05, 0.15)


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
        weighted: whether each noise level gets back the share of updates that floors take from it; "flow": with flow
            matching, as in runs; "epsilon": where runs do not.
        config: the plug-in's options for the loss; what else it has is off.
    """

    name: str
    images: Literal["all", "sharp alone", "all sharp"] = "all"
    repair: Literal["nothing", "means", "restored", "as in runs"] = "nothing"
    floor: float | Literal["d'"] | None = None
    weighted: bool | Literal["flow", "epsilon"] = False
    config: FreqLossConfig = OFF

    def is_weighted(self, *, flow: bool) -> bool:
        """Whether losses are weighted in a world that does flow matching, or does not."""
        return flow == (self.weighted == "flow") if isinstance(self.weighted, str) else self.weighted


STUDY = (
    Arm(PLAIN),
    Arm(SHARP_ALONE, images="sharp alone"),
    Arm("d'² < 16", floor="d'"),
    Arm(AS_IN_RUNS, repair="as in runs", floor=FRACTION, weighted="flow"),
    Arm("the other weights", repair="as in runs", floor=FRACTION, weighted="epsilon"),
    Arm("not gated", repair="as in runs"),
    Arm("not restored", floor=FRACTION, weighted="flow"),
    Arm("means alone restored", repair="means", floor=FRACTION, weighted="flow"),
    Arm(ALL_SHARP, images="all sharp"),
)

# The distribution term where a common error of a batch exists: of what is coarse, at high noise.
TERM = replace(
    OFF, dist_match=1.0, gradient_ratio=0.1, min_timestep=800, max_timestep=1000, low_weight=1.0, high_weight=0.0
)
TERM_ARM = Arm(WITH_TERM, images="all sharp", config=TERM)


def _both(name: str, **properties: object) -> tuple[Arm, Arm]:
    """With and without weights."""
    return Arm(name, **properties), Arm(f"{name}, weighted", weighted=True, **properties)  # type: ignore[arg-type]


PILOT = (
    Arm("d'² < 16, weighted", floor="d'", weighted=True),
    *_both("gated at 5%", floor=0.05),
    Arm("means moved", repair="means"),
    *_both("means moved, gated at 5%", repair="means", floor=0.05),
    Arm("restored", repair="restored"),
    *(
        arm
        for each in PILOT_FRACTIONS
        for arm in _both(f"restored, gated at {each:.0%}", repair="restored", floor=each)
    ),
)
BY_NAME = {arm.name: arm for arm in (*STUDY, TERM_ARM, *PILOT)}
