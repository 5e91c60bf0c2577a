"""All images of a run: what is wrong with them, and the least timestep at which each may train.

Images without a defect are the references: each defect is made on them, and the VAE of the run tells what it does to
their latents (`freq_loss_plugin.image_quality.detectability`).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .. import image_files
from ..options.config import FreqLossConfig
from ..options.fields import ConfigError
from ..options.image_rules import LEAST, RESOLUTION, rules_by_image
from .defects import Defect
from .detectability import least_timestep, patch_energy
from .measurement import Measurement, measure_file

Size: TypeAlias = tuple[int, int]
# A measurement, or why there is none.
Measured: TypeAlias = Measurement | str
# The latents of an RGB image whose sides are multiples of `GRANULARITY`, as the model is trained on them.
Encode: TypeAlias = Callable[[Image.Image], Tensor]

# The entry of a LoRA file's metadata that holds the summary.
SUMMARY_KEY = "ss_freq_loss_image_quality_summary"
GRANULARITY = 64  # at least the factor of any VAE
_REFERENCES, _MOST_REFERENCE_SIDE = 8, 512
# Fewer sharp images than this fraction are worth a warning.
_FEW = 0.1
_MOST_LISTED = 8


@dataclass(frozen=True)
class Survey:
    """The result for all images of a run.

    Attributes:
        least: the least timestep, on the scale 0..1000, of every image that must not train at all of them.
        summary: one line: how many images of which quality train from where on.
        warnings: what the user should know, one sentence each.
    """

    least: Mapping[Path, int]
    summary: str
    warnings: Sequence[str]


def survey(
    images: Mapping[Path, Size],
    config: FreqLossConfig,
    encode: Encode,
    snr: Tensor,
    *,
    end: int,
    measure: Callable[[Mapping[Path, Size]], Mapping[Path, Measured]] | None = None,
) -> Survey:
    """Find the least timestep of every image.

    Args:
        images: the training images, and the width and height to which each is resized before it is cropped.
        config: the options.
        encode: see `Encode`.
        snr: see `freq_loss_plugin.image_quality.detectability.signal_to_noise`.
        end: the end, exclusive, of the timesteps that the trainer draws, on the scale 0..1000.
        measure: measures images; `measure_all` where left out.

    Raises:
        ConfigError: images that cannot be read, a rule for a folder that is not there, no sharp image to compare with,
            or images that could never train.
    """
    rules = rules_by_image(config.image_rules or {}, images)
    fixed = {image: int(rule[LEAST]) for image, rule in rules.items() if LEAST in rule}
    defects = {image: Defect(resolution=rule[RESOLUTION]) for image, rule in rules.items() if RESOLUTION in rule}
    defects = {image: defect for image, defect in defects.items() if defect}
    is_auto = config.image_quality == "auto"
    to_measure = {image: size for image, size in images.items() if image not in rules}
    found = check_readable((measure or measure_all)(to_measure)) if is_auto or defects else {}
    if is_auto:
        defects |= {image: one.defect for image, one in found.items() if one.defect}
    references = pick_references(found, images)
    if defects and not references:
        raise _no_reference(images, defects)
    energies = defect_energies(set(defects.values()), references, images, encode)
    least = {
        image: least_timestep(energies[defect], snr, config.image_quality_threshold)
        for image, defect in defects.items()
    }
    least = {image: value for image, value in (least | fixed).items() if value > 0}
    _check_reachable(least, end)
    return Survey(least, _summary(images, defects, least), _warnings(found if is_auto else {}, images, least))


def measure_all(images: Mapping[Path, Size | None]) -> dict[Path, Measured]:
    """Measure image files, in as many threads as there are cores; with a progress bar.

    Args:
        images: files, and the size to which each is resized before training; None for its own.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each thread its own image
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(_try_to_measure, images, images.values())
            bar = tqdm(results, "measuring images", len(images), disable=not images, leave=False)
            return dict(zip(images, bar, strict=True))
    finally:
        torch.set_num_threads(threads)


def check_readable(found: Mapping[Path, Measured]) -> dict[Path, Measurement]:
    """The measurements; raises ConfigError where there is none of an image."""
    broken = {image: f"{image} ({one})" for image, one in found.items() if isinstance(one, str)}
    if broken:
        hint = image_files.missing_package(broken)
        raise ConfigError(f"images that cannot be read: {listed(broken.values())}; repair or remove them{hint}")
    return {image: one for image, one in found.items() if not isinstance(one, str)}


def pick_references(found: Mapping[Path, Measurement], images: Mapping[Path, Size]) -> list[Path]:
    """Some good images that are large enough, from all over the set; those whose sharpness is known, if there are any.

    Args:
        found: the measurements.
        images: the sizes in training.
    """
    good = [image for image, one in found.items() if not one.defect and min(images[image]) >= GRANULARITY]
    known = [image for image in good if found[image].blur is not None]
    chosen = sorted(known or good)
    return chosen[:: max(1, -(-len(chosen) // _REFERENCES))]


def defect_energies(
    defects: Iterable[Defect],
    references: Sequence[Path],
    images: Mapping[Path, Size],
    encode: Encode,
    most_side: int = _MOST_REFERENCE_SIDE,
) -> dict[Defect, float]:
    """|dz|^2 of a patch by each defect, the median over reference images.

    Args:
        defects: what is made on the references.
        references: good images.
        images: their sizes in training.
        encode: see `Encode`.
        most_side: only the middle of larger references is encoded.
    """
    defects = sorted(defects, key=str)
    if not defects:
        return {}
    found: dict[Defect, list[float]] = {defect: [] for defect in defects}
    with tqdm(total=len(references) * len(defects), desc="comparing image qualities", leave=False) as bar:
        for file in references:
            image = _reference(file, images[file], most_side)
            clean = encode(image)
            for defect in defects:
                difference = encode(defect.apply(image)) - clean
                found[defect].append(patch_energy(difference, image.width * image.height, math.prod(images[file])))
                bar.update()
    return {defect: float(np.median(values)) for defect, values in found.items()}


def listed(things: Iterable[object], most: int = _MOST_LISTED) -> str:
    """The first few of them, comma-separated, and how many more there are."""
    names = list(map(str, things))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _try_to_measure(image: Path, size: Size | None) -> Measured:
    try:
        return measure_file(image, size)
    except image_files.UNREADABLE as error:
        return f"{type(error).__name__}: {error}"


def _no_reference(images: Mapping[Path, Size], defects: Mapping[Path, Defect]) -> ConfigError:
    kinds = Counter(map(str, defects.values())).most_common(3)
    return ConfigError(
        f"freq_loss_image_quality: none of the {len(images)} images is sharp, so there is nothing to compare with "
        f"({listed(f'{count} at {kind}' for kind, count in kinds)}). Add sharp images, a few are enough; or set a "
        'least timestep by hand, [freq_loss.image_quality] "FOLDER" = { least_timestep = 600 }; or, where the '
        "softness is the style, set freq_loss_image_quality = 'off'"
    )


def _reference(file: Path, size: Size, most_side: int) -> Image.Image:
    """The middle of a reference image as it is trained, its sides multiples of `GRANULARITY`."""
    image = image_files.open_rgb(file)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    width, height = (min(side // GRANULARITY * GRANULARITY, most_side) for side in size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _check_reachable(least: Mapping[Path, int], end: int) -> None:
    unreachable = [f"{image.name} (t >= {value})" for image, value in least.items() if value >= end]
    if unreachable:
        raise ConfigError(
            f"{len(unreachable)} images may only train above every timestep of this run (max_timestep = {end}): "
            f"{listed(unreachable)}; remove them, raise max_timestep, or raise freq_loss_image_quality_threshold"
        )


def _summary(images: Mapping[Path, Size], defects: Mapping[Path, Defect], least: Mapping[Path, int]) -> str:
    """``24 images: 6 full quality, 18 at 12% of the resolution, train at t >= 690``."""
    groups = Counter((_quality(defects.get(image)), value) for image, value in least.items())
    parts = [f"{len(images) - len(least)} full quality"]
    shown = groups.most_common(_MOST_LISTED)
    parts += [f"{count} {quality}, train at t >= {value}" for (quality, value), count in shown]
    rest = sum(groups.values()) - sum(count for _, count in shown)
    parts += [f"{rest} others, train at t >= {min(least.values())} or more"] if rest else []
    return f"{len(images)} images: {'; '.join(parts)}"


def _quality(defect: Defect | None) -> str:
    return "by your own rule" if defect is None else f"at {defect}"


def _warnings(found: Mapping[Path, Measurement], images: Mapping[Path, Size], least: Mapping[Path, int]) -> list[str]:
    by_note: dict[str, list[str]] = {}
    for image, one in found.items():
        for note in one.notes:
            by_note.setdefault(note, []).append(image.name)
    warnings = [f"{len(names)} images, {note}: {listed(names)}" for note, names in by_note.items()]
    sharp = len(images) - len(least)
    if least and sharp < _FEW * len(images):
        warnings.append(
            f"only {sharp} of {len(images)} images are of full quality: hardly anything teaches the fine detail, which "
            "low noise levels are for; add sharp images"
        )
    return warnings
