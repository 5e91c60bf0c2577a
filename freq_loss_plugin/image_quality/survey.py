"""All images of a run: what is wrong with them, how their latents are restored, and from which timestep on they train.

Images without a defect are the references: each defect is made on them, and the VAE of the run tells what it does to
their latents. A filter takes that back as far as it can, and the least timestep hides what remains
(`freq_loss_plugin.image_quality.restoration`). Sharp images of a set may be few and alike, and a filter that has seen
nothing else makes others worse. So a few synthetic images are among the references (`SYNTHETIC`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .. import image_files
from ..loss.latents import NUM_TRAIN_TIMESTEPS
from ..options.config import FreqLossConfig
from ..options.fields import ConfigError
from ..options.image_rules import LEAST, RESOLUTION, rules_by_image
from . import dead_leaves
from .defects import Defect
from .measurement import Measurement
from .measuring import Measured, measure_all
from .restoration import Restoration, fit
from .trained_image import TrainedImage

# The latents, shape (C, H, W), of an RGB image whose sides are multiples of `GRANULARITY`, as the model is trained on
# them.
Encode: TypeAlias = Callable[[Image.Image], Tensor]
Restorations: TypeAlias = Mapping[Defect, Restoration]

# The entry of a LoRA file's metadata that holds the summary.
SUMMARY_KEY = "ss_freq_loss_image_quality_summary"
GRANULARITY = 64  # at least the factor of any VAE
SYNTHETIC = 4
_REFERENCES, _MOST_REFERENCE_SIDE = 8, 512
# Fewer sharp images than this fraction are worth a warning.
_FEW = 0.1
# Images that train above this fraction of the timesteps alone hardly train.
_HARDLY = 0.95
_MOST_LISTED = 8


@dataclass(frozen=True)
class Survey:
    """The result for all images of a run.

    Attributes:
        least: the least timestep, on the scale 0..1000, of every image that must not train at all of them.
        restorations: the filter for the latents of every image that has one.
        summary: one line: how many images of which quality train from where on.
        warnings: what the user should know, one sentence each.
    """

    least: Mapping[TrainedImage, int]
    restorations: Mapping[TrainedImage, Restoration]
    summary: str
    warnings: Sequence[str]

    def with_warnings(self, warnings: Iterable[str]) -> Survey:
        """The same with further warnings."""
        return replace(self, warnings=[*self.warnings, *warnings])


def survey(
    images: Iterable[TrainedImage],
    config: FreqLossConfig,
    encode: Encode,
    snr: Tensor,
    *,
    end: int,
    measure: Callable[[Sequence[TrainedImage]], Mapping[TrainedImage, Measured]] = measure_all,
    once: Callable[[Callable[[], Restorations]], Restorations] = lambda work: work(),
) -> Survey:
    """Find out how the latents of every image are restored, and its least timestep.

    Args:
        images: the training images at the sizes at which they are trained; the same in all processes.
        config: the options.
        encode: see `Encode`.
        snr: see `freq_loss_plugin.image_quality.noise_schedules.signal_to_noise`.
        end: the end, exclusive, of the timesteps that the trainer draws, on the scale 0..1000.
        measure: measures images.
        once: does the work that is to be done by one process of several, and returns its result in all of them.

    Raises:
        ConfigError: images that cannot be read, a rule for a folder that is not there, no sharp image to compare with,
            or images that could never train.
    """
    images = list(dict.fromkeys(images))
    by_file = rules_by_image(config.image_rules or {}, [image.file for image in images])
    rules = {image: by_file[image.file] for image in images if image.file in by_file}
    fixed = {image: int(rule[LEAST]) for image, rule in rules.items() if LEAST in rule}
    defects = {image: Defect(resolution=rule[RESOLUTION]) for image, rule in rules.items() if RESOLUTION in rule}
    defects = {image: defect for image, defect in defects.items() if defect}
    is_auto = config.image_quality == "auto"
    to_measure = [image for image in images if image not in rules] if is_auto or defects else []
    found = check_readable(measure(to_measure))
    if is_auto:
        defects |= {image: one.defect for image, one in found.items() if one.defect}
    references = pick_references(found)
    if defects and not references:
        raise _no_reference(images, defects)
    by_defect = once(lambda: fit_defects(set(defects.values()), references, encode))
    floors = floors_of(by_defect, snr, config.image_quality_threshold)
    least = {image: min(floors[defect], end - 1) for image, defect in defects.items()} | fixed
    least = {image: value for image, value in least.items() if value > 0}
    _check_reachable(fixed, end)
    restorations = {image: by_defect[defect] for image, defect in defects.items() if by_defect[defect].restored > 0}
    found = found if is_auto else {}
    others = [image for image in images if image not in least and image not in defects]
    sharp = [image for image in others if image not in found or found[image].is_known]
    warnings = [*_notes(found), *_few(images, least, len(sharp), end)]
    return Survey(least, restorations, _summary(images, defects, least, by_defect, len(sharp)), warnings)


def check_readable(found: Mapping[TrainedImage, Measured]) -> dict[TrainedImage, Measurement]:
    """The measurements; raises ConfigError where there is none of an image."""
    broken = {image.file: f"{image.file} ({one})" for image, one in found.items() if isinstance(one, str)}
    if broken:
        hint = image_files.missing_package(broken)
        raise ConfigError(f"images that cannot be read: {listed(broken.values())}; repair or remove them{hint}")
    return {image: one for image, one in found.items() if not isinstance(one, str)}


def pick_references(found: Mapping[TrainedImage, Measurement]) -> list[TrainedImage]:
    """Some images of full quality that are large enough, from all over the set.

    Args:
        found: the measurements.
    """
    good = [image for image, one in found.items() if one.is_good and min(one.trained) >= GRANULARITY]
    chosen = sorted(good, key=repr)
    return chosen[:: max(1, -(-len(chosen) // _REFERENCES))]


def fit_defects(
    defects: Iterable[Defect],
    references: Sequence[TrainedImage],
    encode: Encode,
    most_side: int = _MOST_REFERENCE_SIDE,
) -> dict[Defect, Restoration]:
    """How the latents of images with each defect are restored, as far as they can be.

    Args:
        defects: what is made on the references.
        references: good images; synthetic ones join them.
        encode: see `Encode`.
        most_side: only the middle of larger references is encoded.
    """
    defects = sorted(defects, key=str)
    if not defects:
        return {}
    images = [_middle(reference, most_side) for reference in references]
    side = max(min(image.size) for image in images)
    images += [dead_leaves.draw(side, seed) for seed in range(SYNTHETIC)]
    with tqdm(total=len(images) * (len(defects) + 1), desc="comparing image qualities", leave=False) as bar:

        def encode_all(damaged: Iterable[Image.Image]) -> list[Tensor]:
            latents = []
            for image in damaged:
                latents.append(encode(image).cpu())
                if not latents[-1].isfinite().all():
                    raise ConfigError(
                        "freq_loss_image_quality: the VAE returns NaN; use one that works in this precision"
                    )
                bar.update()
            return latents

        sharp = encode_all(images)
        return {defect: fit(sharp, encode_all(map(defect.apply, images))) for defect in defects}


def floors_of(restorations: Restorations, snr: Tensor, fraction: float) -> dict[Defect, int]:
    """The least timestep of each defect, at most 999; never lower than that of a defect which is in no way worse.

    Args:
        restorations: what remains of each defect.
        snr: see `freq_loss_plugin.image_quality.noise_schedules.signal_to_noise`.
        fraction: see `freq_loss_plugin.image_quality.restoration.least_timestep`.
    """
    last = NUM_TRAIN_TIMESTEPS - 1
    floors = {defect: min(one.least_timestep(snr, fraction), last) for defect, one in restorations.items()}
    return {worse: max(floor for defect, floor in floors.items() if defect.is_at_most(worse)) for worse in floors}


def listed(things: Iterable[object], most: int = _MOST_LISTED) -> str:
    """The first few of them, comma-separated, and how many more there are."""
    names = list(map(str, things))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _no_reference(images: Sequence[TrainedImage], defects: Mapping[TrainedImage, Defect]) -> ConfigError:
    kinds = Counter(map(str, defects.values())).most_common(3)
    return ConfigError(
        f"freq_loss_image_quality: none of the {len(images)} images is sharp, so there is nothing to compare with "
        f"({listed(f'{count} at {kind}' for kind, count in kinds)}). Add sharp images, a few are enough; or set a "
        'least timestep by hand, [freq_loss.image_quality] "FOLDER" = { least_timestep = 600 }; or, where the '
        "softness is the style, set freq_loss_image_quality = 'off'"
    )


def _middle(reference: TrainedImage, most_side: int) -> Image.Image:
    """The middle of an image as it is trained, its sides multiples of `GRANULARITY`."""
    image = reference.open()
    size = reference.size or image.size
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    width, height = (min(side // GRANULARITY * GRANULARITY, most_side) for side in size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _check_reachable(least: Mapping[TrainedImage, int], end: int) -> None:
    unreachable = [f"{image.file.name} (t >= {value})" for image, value in least.items() if value >= end]
    if unreachable:
        raise ConfigError(
            f"{len(unreachable)} images may only train above every timestep of this run (max_timestep = {end}): "
            f"{listed(unreachable)}; remove them, raise max_timestep, or lower their least_timestep in "
            "[freq_loss.image_quality]"
        )


def _summary(
    images: Sequence[TrainedImage],
    defects: Mapping[TrainedImage, Defect],
    least: Mapping[TrainedImage, int],
    restorations: Restorations,
    sharp: int,
) -> str:
    """``24 images: 6 full quality; 18 at 25% of the resolution, 73% restored, train at t >= 690``."""

    def quality(image: TrainedImage) -> str:
        defect = defects.get(image)
        return "by your own rule" if defect is None else f"at {defect}, {restorations[defect].restored:.0%} restored"

    groups = Counter((quality(image), value) for image, value in least.items())
    slight = len(defects.keys() - least.keys())
    everywhere = {"not known": len(images) - len(least) - slight - sharp, "with slight defects, restored": slight}
    parts = [f"{sharp} full quality"]
    parts += [f"{count} {kind}, train at every t" for kind, count in everywhere.items() if count]
    shown = groups.most_common(_MOST_LISTED)
    parts += [f"{count} {quality}, train at t >= {value}" for (quality, value), count in shown]
    rest = sum(groups.values()) - sum(count for _, count in shown)
    parts += [f"{rest} others, train at t >= {min(least.values())} or more"] if rest else []
    files = len({(image.file, image.part) for image in images})
    number = f"{files} images" if files == len(images) else f"{files} images at several sizes, {len(images)} in all"
    return f"{number}: {'; '.join(parts)}"


def _notes(found: Mapping[TrainedImage, Measurement]) -> list[str]:
    by_note: dict[str, list[str]] = {}
    for image, one in found.items():
        for note in one.notes:
            by_note.setdefault(note, []).append(image.file.name)
    return [f"{len(names)} images, {note}: {listed(names)}" for note, names in by_note.items()]


def _few(
    images: Sequence[TrainedImage],
    least: Mapping[TrainedImage, int],
    sharp: int,
    end: int,
) -> list[str]:
    """What there is too little of.

    Args:
        images: all.
        least: their least timesteps.
        sharp: how many are of full quality.
        end: see `survey`.
    """
    warnings = []
    if least and sharp < _FEW * len(images):
        warnings.append(
            f"only {sharp} of {len(images)} images are of full quality: hardly anything teaches the fine detail, which "
            "low noise levels are for; add sharp images"
        )
    hardly = [image.file.name for image, value in least.items() if value >= _HARDLY * end]
    if hardly:
        warnings.append(
            f"{len(hardly)} images hardly train, since what is wrong with them can be seen at nearly all noise levels: "
            f"{listed(hardly)}"
        )
    return warnings
