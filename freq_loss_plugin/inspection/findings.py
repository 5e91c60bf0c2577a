"""What was found in a set of images: as rows, as a table in plain text, as JSON, and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..image_files import NOTES, missing_package
from ..image_quality.measurement import GOOD_JPEG, Measurement

_MOST_ROWS, _MOST_NAME = 40, 44
# Less than this fraction of sharp images is few.
_FEW = 0.1
# What is known of an image.
FULL, NOT_KNOWN, DEFECT, NOT_READABLE = "full quality", "not known", "defect", "not readable"


@dataclass(frozen=True)
class Finding:
    """One image.

    Attributes:
        name: the file, relative to the folder that all images have in common.
        file: its path.
        measured: what was measured; None where it cannot be read.
        restored: the fraction of the squared error in its latents that a filter takes back; 0 where nothing is wrong.
        least: the least timestep at which it then trains; 0 where it trains at all of them.
        error: why it cannot be read.
    """

    name: str
    file: Path
    measured: Measurement | None
    restored: float = 0.0
    least: int = 0
    error: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether something is wrong with the image."""
        return self.measured is None or bool(self.measured.defect)

    @property
    def quality(self) -> str:
        """What is known of the image, in a word or two."""
        if self.measured is None:
            return NOT_READABLE
        if self.measured.defect:
            return DEFECT
        return FULL if self.measured.is_known else NOT_KNOWN

    @property
    def resolution(self) -> float | None:
        """The effective resolution; None where it is not known."""
        if self.measured is None or (not self.measured.is_measured and self.measured.resolution == 1):
            return None
        return self.measured.resolution

    @property
    def badness(self) -> tuple[bool, int, bool, float]:
        """What the images are sorted by: those that cannot be read, the least timestep, and those not known."""
        return self.measured is None, self.least, self.quality == NOT_KNOWN, -(self.resolution or 1.0)

    @property
    def remark(self) -> str:
        """What else there is to say."""
        if self.measured is None:
            return self.error
        witness = [self.measured.witness] if self.measured.witness else []
        return "; ".join([*witness, *self.measured.notes]) or ("" if self.is_bad else self.quality)

    def cells(self) -> list[str]:
        """Size, effective resolution, JPEG quality, noise, restored fraction and least timestep, as text."""
        one = self.measured
        if one is None:
            return ["?"] * 6
        size = f"{one.size[0]}x{one.size[1]}"
        resolution = "?" if self.resolution is None else f"{self.resolution:.0%}"
        restored = f"{self.restored:.0%}" if one.defect else "-"
        return [size, resolution, str(one.jpeg or "-"), f"{one.noise:.1f}", restored, str(self.least)]

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        if self.measured is None:
            return {"file": str(self.file), "quality": self.quality, "error": self.error}
        one = self.measured
        return {
            "file": str(self.file),
            "quality": self.quality,
            "width": one.size[0],
            "height": one.size[1],
            "trained_width": one.trained[0],
            "trained_height": one.trained[1],
            "effective_resolution": self.resolution,
            "blur": one.blur,
            "jpeg_quality": one.jpeg,
            "noise": one.noise,
            "witness": one.witness,
            "restored": self.restored if one.defect else None,
            "least_timestep": self.least,
            "notes": list(one.notes),
        }


HEADINGS = ("image", "size", "resolution", "JPEG", "noise", "restored", "t", "remark")


def make_findings(
    found: Mapping[Path, Measurement | str], restoring: Mapping[Path, tuple[float, int]]
) -> list[Finding]:
    """The findings, worst first.

    Args:
        found: a measurement for each image, or why there is none.
        restoring: the restored fraction and the least timestep of each image with a defect.
    """
    folder = _common_folder(list(found))
    findings = []
    for file, one in found.items():
        name = (file if folder is None else file.relative_to(folder)).as_posix()
        if isinstance(one, str):
            findings.append(Finding(name, file, None, error=one))
        else:
            findings.append(Finding(name, file, one, *restoring.get(file, (0.0, 0))))
    return sorted(findings, key=lambda finding: finding.badness, reverse=True)


def table(findings: Sequence[Finding]) -> str:
    """The worst images as a table in plain text."""
    rows = [HEADINGS, *([_shortened(each.name), *each.cells(), each.remark] for each in findings[:_MOST_ROWS])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers, row[-1]]).rstrip())
    rest = len(findings) - _MOST_ROWS
    return "\n".join(lines + ([f"... and {rest} more; --json or --html has all"] if rest > 0 else []))


def summary(findings: Sequence[Finding]) -> str:
    """How many images there are, and how many of them are bad in which way."""
    qualities = Counter(each.quality for each in findings)
    defects = [each.measured.defect for each in findings if each.measured is not None]
    parts = {
        FULL: qualities[FULL],
        "blurred or enlarged": sum(defect.resolution < 1 for defect in defects),
        f"JPEG below quality {GOOD_JPEG}": sum(defect.jpeg is not None for defect in defects),
        "noisy": sum(defect.noise > 0 for defect in defects),
        NOT_KNOWN: qualities[NOT_KNOWN],
        NOT_READABLE: qualities[NOT_READABLE],
    }
    return f"{len(findings)} images: " + ", ".join(f"{count} {name}" for name, count in parts.items() if count)


def advice(findings: Sequence[Finding]) -> list[str]:
    """What to do, one sentence each."""
    count = Counter(each.quality for each in findings)
    said = []
    if unreadable := [each for each in findings if each.measured is None]:
        hint = missing_package(each.file for each in unreadable)
        said.append(
            f"{len(unreadable)} images cannot be read, for the reason beside them, and trainers stop there: repair or "
            f"remove them{hint}."
        )
    if count[DEFECT]:
        said += _about_bad([each for each in findings if each.quality == DEFECT], count[FULL], len(findings))
    if count[NOT_KNOWN]:
        said.append(
            f"Of {count[NOT_KNOWN]} images the quality is not known, for the reason beside them: they train at all "
            "timesteps. Look at them yourself."
        )
    notes = Counter(note for each in findings if each.measured for note in each.measured.notes if note in NOTES)
    said += [f"{number} images are {note}." for note, number in notes.items()]
    return said or ["Nothing to do: all are of full quality."]


def _about_bad(bad: Sequence[Finding], sharp: int, number: int) -> list[str]:
    if not sharp:
        return [
            "No image is known to be of full quality, so there is nothing to compare with, and nothing that teaches "
            "fine detail. Add sharp images; a few are enough. Or, where the softness is the style, leave "
            "freq_loss_image_quality off; or set least timesteps by hand in [freq_loss.image_quality].",
        ]
    later = [each.least for each in bad if each.least > 0]
    said = [
        f'freq_loss_image_quality = "auto" restores the latents of the {len(bad)} bad images with a filter, which '
        f"takes back {_range([round(100 * each.restored) for each in bad])}% of the squared error of their latents.",
        f"{len(later)} of {number} images no longer train below t = {_range(later)} (of 1000), the others at every t."
        if later
        else "All images train at every timestep.",
        "Better versions of the bad images, if there are any, are better still.",
    ]
    if sharp < _FEW * number:
        said.append(f"Only {sharp} of {number} are of full quality: little teaches fine detail. Add sharp ones.")
    return said


def _range(values: Sequence[int]) -> str:
    """``540``, or ``380 to 690``."""
    return " to ".join(map(str, sorted({min(values), max(values)})))


def _common_folder(files: Sequence[Path]) -> Path | None:
    folders = [file.parent for file in files]
    common = folders[0]
    while any(common != folder and common not in folder.parents for folder in folders):
        if common == common.parent:
            return None  # on several drives of Windows
        common = common.parent
    return common


def _shortened(name: str) -> str:
    return name if len(name) <= _MOST_NAME else f"...{name[-_MOST_NAME + 3 :]}"
