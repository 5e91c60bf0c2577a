"""One trial: a LoRA trained in one arm, with one seed, on one style; and what is measured of it."""

from __future__ import annotations

import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from assets.make_tiny_flow import emoji

from . import measures, real_fake
from .arms import ARMS, BALANCE, DDPM_ONLY, IMPERFECT, REAL, REAL_FAKE, SHAM, WITHOUT_DEFECT, Arm
from .emoji import EmojiTrainee, EmojiWorld
from .images import DEFECTS, MIXTURE, write
from .report import samples_name
from .toy import ToyWorld
from .training import ArmTraining
from .world import World

TOY, EMOJI = ("frames", "weave"), ("twitter", "line art")
STEPS, REAL_FAKE_STEPS = 120, 300
IMAGES_PER_CLASS = (8, 16)
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
_TOY_RATES = (*RATES, 1.6e-2)
# Learning rates are chosen on seeds of their own, one for each style of a model.
RATE_SEEDS, SHAM_SEEDS = (900, 901), 2
_NO_DEFECT = "none"


@dataclass(frozen=True)
class Trial:
    """What is trained.

    Attributes:
        study: ``rates``, ``balance``, ``imperfect`` or ``real_fake``.
        arm: the name of an arm of the study.
        style: the name of the world.
        defect: of the training images that are not sharp; in ``real_fake`` the number of images per class.
        seed: of the training images, the LoRA, the batches, the noise and the timesteps.
        rate: the peak learning rate.
    """

    study: str
    arm: str
    style: str
    defect: str
    seed: int
    rate: float

    @property
    def key(self) -> tuple[str, ...]:
        """As in the results file."""
        return self.arm, self.style, self.defect, str(self.seed), f"{self.rate:g}"


def rate_trials() -> list[Trial]:
    """Every arm of the balance study at every learning rate."""
    return [
        Trial("rates", arm.name, style, _NO_DEFECT, seed, rate)
        for styles in (TOY, EMOJI)
        for seed, style in zip(RATE_SEEDS, styles, strict=True)
        for arm in BALANCE
        for rate in (_TOY_RATES if styles is TOY else RATES)
        if arm.name != SHAM and _fits(arm, style)
    ]


def balance_trials(seeds: range, rates: dict[tuple[bool, str], float]) -> list[Trial]:
    """Seed by seed, so that an interrupted study has whole pairs."""
    return [
        Trial("balance", arm.name, style, _NO_DEFECT, seed, rates[style in EMOJI, rate_arm(arm)])
        for seed in seeds
        for style in (*TOY, *EMOJI)
        for arm in BALANCE
        if _fits(arm, style) and (arm.name != SHAM or seed < seeds.start + SHAM_SEEDS)
    ]


def imperfect_trials(seeds: range, rates: dict[tuple[bool, str], float]) -> list[Trial]:
    """On the styles frames and twitter; single defects with half of the arms, and on frames alone."""
    single = {arm.name for arm in IMPERFECT} - {*WITHOUT_DEFECT, "min_timestep = 600 for all"}
    return [
        Trial("imperfect", arm.name, style, defect, seed, rates[style in EMOJI, arm.like])
        for seed in seeds
        for style, defects in ((TOY[0], (MIXTURE, *DEFECTS)), (EMOJI[0], (MIXTURE,)))
        for defect in defects
        for arm in IMPERFECT
        if defect == MIXTURE or arm.name in single
    ]


def real_fake_trials(seeds: range, rates: dict[tuple[bool, str], float]) -> list[Trial]:
    """On the style twitter."""
    return [
        Trial("real_fake", arm.name, EMOJI[0], str(k), seed, rates[True, arm.like])
        for seed in seeds
        for k in IMAGES_PER_CLASS
        for arm in REAL_FAKE
    ]


STUDIES = {"balance": balance_trials, "imperfect": imperfect_trials, "real_fake": real_fake_trials}


def rate_arm(arm: Arm) -> str:
    """The arm whose learning rate an arm of the balance study takes."""
    return arm.like if arm.name == SHAM else arm.name


def run(trial: Trial, folder: Path, device: str) -> dict[str, Any]:
    """Train and measure; returns a row of the results file. The samples are kept in ``folder``."""
    torch.manual_seed(0)
    start = time.perf_counter()
    arm = next(each for each in ARMS[trial.study] if each.name == trial.arm)
    run_study = _run_real_fake if trial.study == "real_fake" else _run_style
    row: dict[str, Any] = dict(zip(("arm", "images", "defect", "seed", "rate"), trial.key, strict=True))
    row |= run_study(trial, arm, folder, device)
    return row | {"seconds": f"{time.perf_counter() - start:.0f}"}


def run_alone(trial: Trial, folder: Path, device: str) -> dict[str, Any]:
    """The same in a process of its own, with one thread."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    return run(trial, folder, device)


def _run_style(trial: Trial, arm: Arm, folder: Path, device: str) -> dict[str, str]:
    world = world_of(trial.style)
    reference = reference_of(trial.style, folder, device)
    trainee = world.new(trial.seed, torch.device(device))
    with tempfile.TemporaryDirectory() as images:
        chosen = arm.images if trial.study == "imperfect" else "varied"
        captions = write(world, chosen, trial.defect, trial.seed, Path(images))
        training = ArmTraining(world, trainee, arm, captions, seed=trial.seed, steps=STEPS, rate=trial.rate)
        training.run()
    if trial.study == "rates":
        measured = measures.validate(trainee, reference)
    else:
        measured, samples = measures.measure(world, trainee, reference)
        np.save(folder / samples_name(trial.study, trial.key), (samples.numpy() * 255).round().astype(np.uint8))
    least = " ".join(f"{least:.0f}" for least in sorted(training.least.tolist()) if least)
    return {"least timesteps": least} | {name: f"{value:.5g}" for name, value in measured.items()}


def _run_real_fake(trial: Trial, arm: Arm, _folder: Path, device: str) -> dict[str, str]:
    task, k = real_fake.make_task(emoji.concepts(emoji.fetch()), trial.seed), int(trial.defect)
    if arm.name == REAL:
        return {"accuracy": f"{real_fake.accuracy_of_real(task, k, trial.style, trial.seed):.5g}"}
    world, trainee = EmojiWorld(trial.style), EmojiTrainee(trial.seed, torch.device(device))
    with tempfile.TemporaryDirectory() as images:
        captions = real_fake.write(task, k, trial.style, Path(images))
        ArmTraining(world, trainee, arm, captions, seed=trial.seed, steps=REAL_FAKE_STEPS, rate=trial.rate).run()
    return {"accuracy": f"{real_fake.accuracy_of_samples(trainee, task, trial.style, trial.seed):.5g}"}


def world_of(style: str) -> World:
    """The world of a style."""
    return EmojiWorld(style) if style in EMOJI else ToyWorld(style)


def _fits(arm: Arm, style: str) -> bool:
    return style in TOY or arm.name not in DDPM_ONLY


@lru_cache(maxsize=4)
def reference_of(style: str, folder: Path, device: str) -> measures.Reference:
    """What the samples of a style are compared with; made once, and kept in ``folder``."""
    file = folder / f"reference-{style}.pt"
    if not file.is_file():
        torch.save(tuple(measures.make_reference(world_of(style), torch.device(device))), file)
    return measures.Reference(*torch.load(file, weights_only=False))
