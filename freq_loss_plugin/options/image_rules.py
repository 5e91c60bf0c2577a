"""What the user knows of images, folder by folder: the section ``[freq_loss.image_quality]``.

[freq_loss.image_quality]
"10_scans" = { least_timestep = 600 }
"5_thumbnails" = { effective_resolution = 0.25 }
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeAlias

from ..loss.latents import NUM_TRAIN_TIMESTEPS
from .fields import ConfigError, nearest

# Folder -> what is known of its images.
ImageRules: TypeAlias = Mapping[str, Mapping[str, float]]

KEY = "image_quality"
LEAST, RESOLUTION = "least_timestep", "effective_resolution"
_EXPECTED = (
    f"{{ {LEAST} = 600 }}, a timestep from 0 to below {NUM_TRAIN_TIMESTEPS}, or {{ {RESOLUTION} = 0.25 }}, a fraction "
    "of the resolution above 0 and at most 1"
)


def check_rules(rules: ImageRules) -> None:
    """Raise ConfigError where a rule says neither, both, or something that cannot be."""
    for folder, rule in rules.items():
        where = f'[freq_loss.{KEY}] "{folder}" = {_written(rule)}'
        if not isinstance(rule, Mapping) or len(rule) != 1 or next(iter(rule)) not in (LEAST, RESOLUTION):
            meant = nearest(next(iter(rule)), [LEAST, RESOLUTION]) if isinstance(rule, Mapping) and rule else None
            suggestion = f"; did you mean {meant}?" if meant and meant not in rule else ""
            raise ConfigError(f"{where}: expected {_EXPECTED}{suggestion}")
        (name, value), *_ = rule.items()
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        fits = is_number and (0 < value <= 1 if name == RESOLUTION else 0 <= value < NUM_TRAIN_TIMESTEPS)
        if not fits:
            raise ConfigError(f"{where}: expected {_EXPECTED}")


def rules_by_image(rules: ImageRules, images: Iterable[Path]) -> dict[Path, Mapping[str, float]]:
    """The rule of every image that has one: that of its folder, or of the nearest folder above it.

    Args:
        rules: names of folders, or the ends of their paths, to rules.
        images: the images of the run.

    Raises:
        ConfigError: a folder has no image of the run in it, or below it.
    """
    images = list(images)
    found: dict[Path, Mapping[str, float]] = {}
    parts = {folder: PurePath(folder.replace("\\", "/")).parts for folder in rules}
    matched = set()
    for image in images:
        for folder in image.parents:  # the nearest first
            names = [name for name, end in parts.items() if end and folder.parts[-len(end) :] == end]
            matched.update(names)
            if names and image not in found:
                found[image] = rules[max(names, key=lambda name: len(parts[name]))]
    for name in rules:
        if name not in matched:
            folders = sorted({image.parent.name for image in images})
            meant = nearest(name, folders)
            suggestion = f" Did you mean {meant!r}?" if meant else ""
            raise ConfigError(
                f'[freq_loss.{KEY}] "{name}": no image of this run is in a folder of that name.{suggestion} '
                f"Folders: {', '.join(folders)}"
            )
    return found


def _written(rule: Any) -> str:
    if not isinstance(rule, Mapping):
        return repr(rule)
    return "{ " + ", ".join(f"{name} = {value!r}" for name, value in rule.items()) + " }"
