"""The arms: how the loss is computed, from which images, and at which timesteps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from freq_loss_plugin import FreqLossConfig

from .images import Images

OFF = FreqLossConfig(dist_match=0.0)
PLAIN = "plain MSE"
_TERM = FreqLossConfig(dist_match=1.0, gradient_ratio=0.1)
Weighting = Literal["none", "min-SNR 5", "debiased", "Haar"]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: as in the tables.
        config: the plug-in's options.
        weighting: of the base loss by the trainer: those of sd-scripts, or plain MSE computed in a Haar basis.
        length: optimizer steps, as a multiple of those of plain MSE.
        min_timestep: sd-scripts' option, for all images.
        images: which of the training images, in the study of imperfect ones.
        like: the arm whose learning rate it takes, where none is chosen for it.
    """

    name: str
    config: FreqLossConfig = OFF
    weighting: Weighting = "none"
    length: int = 1
    min_timestep: int = 0
    images: Images = "all"
    like: str = PLAIN

    @property
    def passes(self) -> int:
        """Passes of the model, as a multiple of those of plain MSE."""
        return self.length * (2 if self.config.enabled and self.config.timesteps == "unified" else 1)


BALANCE = (
    Arm(PLAIN),
    Arm("twice the steps", length=2),
    Arm("min-SNR 5", weighting="min-SNR 5"),
    Arm("debiased estimation", weighting="debiased"),
    Arm("balance by timestep", replace(OFF, balance="timestep")),
    Arm("balance by band", replace(OFF, balance="band")),
    Arm("balance by timestep, power 1", replace(OFF, balance="timestep", balance_power=1.0)),
    Arm("distribution term, 10%", _TERM),
    Arm("balance by band, distribution term", replace(_TERM, balance="band")),
    Arm("sham: MSE in a Haar basis", weighting="Haar"),
)
# Weightings of DDPM trainers only.
DDPM_ONLY = ("min-SNR 5", "debiased estimation")
SHAM = BALANCE[-1].name

IMPERFECT = (
    Arm(PLAIN),
    Arm("sharp images alone", images="sharp"),
    Arm("min_timestep = 600 for all", min_timestep=600),
    Arm("image quality", replace(OFF, image_quality="auto")),
    Arm(
        "image quality, balance by band",
        replace(OFF, image_quality="auto", balance="band"),
        like="balance by band",
    ),
    Arm("all images sharp", images="restored"),
)
REAL = "real images alone"
REAL_FAKE = (
    Arm(PLAIN),
    Arm("distribution term, 10%", _TERM, like="distribution term, 10%"),
    Arm("balance by band", replace(OFF, balance="band"), like="balance by band"),
    Arm(
        "balance by band, distribution term", replace(_TERM, balance="band"), like="balance by band, distribution term"
    ),
    Arm(REAL),  # nothing is sampled: the classifier sees the training images themselves
)
ARMS = {"rates": BALANCE, "balance": BALANCE, "imperfect": IMPERFECT, "real_fake": REAL_FAKE}
# Arms whose images do not depend on the defect are trained for one defect only, and count for all.
WITHOUT_DEFECT = ("sharp images alone", "all images sharp")
