"""What all arms of a cell share: the latents of its photographs, with and without a defect, and fitted filters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from freq_loss_plugin.image_files import open_rgb
from freq_loss_plugin.image_quality import dead_leaves, restoration
from freq_loss_plugin.image_quality.restoration import Restoration
from freq_loss_plugin.image_quality.survey import SYNTHETIC

from . import autoencoders, photographs
from .arms import Arm
from .images import NO_DEFECT, NOMINAL, STYLES, damaged, kind_of
from .worlds import WORLDS, World

TRAINING = 24
# Squares of each photograph that is not trained on: the first is validated on, all are compared with samples.
_OTHERS = 2
# As in `freq_loss_plugin.image_quality.survey`.
_REFERENCES = 8
# Of the rule of detectability: of d'^2, in a patch of so many pixels along each side, and the cap.
_THRESHOLD, _PATCH, _HIGHEST = 16.0, 128, 900
HIGHEST = 999


@dataclass(frozen=True)
class Cell:
    """What is trained on.

    Attributes:
        world: see `worlds.WORLDS`.
        style: see `images.STYLES`.
        defect: see `images.DEFECTS`.
        fraction: of the images that have it.
        seed: of the photographs, and of all that is random.
    """

    world: str
    style: str
    defect: str
    fraction: float
    seed: int

    @property
    def good(self) -> int:
        """How many images have no defect: the first ones."""
        return TRAINING - round(TRAINING * self.fraction)


@dataclass(frozen=True)
class Photographs:
    """Of a style and a seed.

    Attributes:
        training: squares in the style.
        sharp: their latents, shape (24, C, H, W).
        validation: latents of squares of other photographs, shape (18, C, H, W).
        others: latents of more of them.
    """

    training: list[Image.Image]
    sharp: Tensor
    validation: Tensor
    others: Tensor


@lru_cache(maxsize=1)
def photographs_of(world: World, style: str, seed: int) -> Photographs:
    """The photographs are shuffled; the first ones are trained on."""
    numbers = np.random.default_rng((72, seed))
    files = photographs.study_photographs()
    images = [open_rgb(files[place]) for place in numbers.permutation(len(files))]

    def square(image: Image.Image) -> Image.Image:
        return STYLES[style](photographs.half_square(image, numbers), numbers)

    training = [square(image) for image in images[:TRAINING]]
    others = [square(image) for _ in range(_OTHERS) for image in images[TRAINING:]]
    sharp, rest = (autoencoders.encode(world.autoencoder, which) for which in (training, others))
    return Photographs(training, sharp, rest[: len(images) - TRAINING], rest)


@dataclass(frozen=True)
class Fit:
    """A filter for a defect, fitted on the sharp images of a cell.

    Attributes:
        restored: the filter.
        means: one that moves the channel means alone.
        as_in_runs: one that is fitted on some of these images and on synthetic ones; see `survey.fit_defects`.
        distance: squared, between latents with and without the defect, its median over references; of a patch.
    """

    restored: Restoration
    means: Restoration
    as_in_runs: Restoration
    distance: float

    def repair(self, arm: Arm) -> Restoration | None:
        """What an arm does to latents."""
        repairs = {"nothing": None, "means": self.means, "restored": self.restored, "as in runs": self.as_in_runs}
        return repairs[arm.repair]

    def least(self, arm: Arm, snr: Tensor) -> int:
        """The least timestep of images with the defect."""
        if arm.floor is None:
            return 0
        if arm.floor == "d'":
            seen = (snr * self.distance >= _THRESHOLD).nonzero()
            return min(int(seen.max()) + 1, _HIGHEST) if len(seen) else 0
        repair = self.repair(arm)
        if repair is None:
            one = self.restored
            least = restoration.least_timestep(one.error_before, one.sharp, snr, arm.floor, one.counts)
        else:
            least = repair.least_timestep(snr, arm.floor)
        return min(least, HIGHEST)


@dataclass(frozen=True)
class Prepared:
    """A cell's latents and fits.

    Attributes:
        photographs: see there.
        good: how many images have no defect: the first ones.
        bad: latents of the others, with the defect.
        fits: for each of these.
    """

    photographs: Photographs
    good: int
    bad: list[Tensor]
    fits: list[Fit]

    def trained(self, arm: Arm, snr: Tensor) -> tuple[Tensor, Tensor]:
        """What an arm trains on: latents (n, C, H, W), and the least timestep of each, shape (n,).

        Args:
            arm: see `arms`.
            snr: at the timesteps 0..999.
        """
        if arm.images == "all sharp":
            return self.photographs.sharp, torch.zeros(TRAINING)
        latents, least = list(self.photographs.sharp[: self.good]), [0] * self.good
        for bad, fit in zip(self.bad, self.fits, strict=True) if arm.images == "all" else ():
            repair = fit.repair(arm)
            latents.append(bad if repair is None else repair.apply(bad))
            least.append(fit.least(arm, snr))
        return torch.stack(latents), torch.tensor(least)


@lru_cache(maxsize=1)
def prepare(cell: Cell) -> Prepared:
    """Make the defects, encode, and fit."""
    world = WORLDS[cell.world]
    found = photographs_of(world, cell.style, cell.seed)
    if cell.defect == NO_DEFECT:
        return Prepared(found, cell.good, [], [])
    numbers = np.random.default_rng((73, cell.seed))
    kinds = [kind_of(cell.defect, number) for number in range(TRAINING - cell.good)]
    images = [damaged(image, kind, numbers) for image, kind in zip(found.training[cell.good :], kinds, strict=True)]
    fits = {kind: _fit(world, kind, found, cell.good) for kind in dict.fromkeys(kinds)}
    bad = list(autoencoders.encode(world.autoencoder, images))
    return Prepared(found, cell.good, bad, [fits[kind] for kind in kinds])


def _fit(world: World, kind: str, found: Photographs, good: int) -> Fit:
    images = [*found.training[:good], *_synthetic()]
    bad = autoencoders.encode(
        world.autoencoder, [NOMINAL[kind].apply(image, seed) for seed, image in enumerate(images)]
    )
    (bad, synthetic), sharp = bad.split([good, SYNTHETIC]), found.sharp[:good]
    some = slice(None, None, -(-good // _REFERENCES))
    as_in_runs = restoration.fit([*sharp[some], *_synthetic_latents(world)], [*bad[some], *synthetic])
    fitted = restoration.fit(list(sharp), list(bad))
    energies = (bad - sharp).square().sum(dim=(1, 2, 3)) * (_PATCH / photographs.SIDE) ** 2
    return Fit(fitted, _means_alone(fitted, sharp, bad), as_in_runs, float(energies.median()))


@lru_cache(maxsize=1)
def _synthetic() -> list[Image.Image]:
    return [dead_leaves.draw(photographs.SIDE, seed) for seed in range(SYNTHETIC)]


@lru_cache
def _synthetic_latents(world: World) -> Tensor:
    return autoencoders.encode(world.autoencoder, _synthetic())


def _means_alone(fitted: Restoration, sharp: Tensor, bad: Tensor) -> Restoration:
    """A filter that moves the channel means, and what remains then, by references left out one at a time."""
    count, pixels = len(sharp), sharp[0, 0].numel()
    before, after = bad.mean(dim=(2, 3)), sharp.mean(dim=(2, 3))
    differences = before - after
    left_out = (differences - differences.mean(dim=0)) * count / (count - 1)
    error = fitted.error_before.clone()
    error[0] = left_out.T @ left_out * pixels / count
    return Restoration(
        matrices=torch.eye(sharp.shape[1]).expand_as(fitted.matrices),
        mean_before=before.mean(dim=0),
        mean_after=after.mean(dim=0),
        error=error,
        error_before=fitted.error_before,
        sharp=fitted.sharp,
        ridge=math.inf,
        counts=fitted.counts,
    )
