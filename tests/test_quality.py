"""The study behind "Does it help?": arms against NumPy, metrics on known sets, tables, and one trial."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch

from freq_loss_plugin.training.passes import Pass

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "quality"))

import arms
import metrics
import report
import trial

STUDY = Path(arms.__file__).parent
ALPHAS = oracle.stable_diffusion_alphas_cumprod()
TIMESTEP = 400
# The arms of packages that need not be here.
PUBLISHED = {f"{name}, {how}" for name in ("wavelet-loss", "focal") for how in ("as published", "10%")}


def batch(count=4, side=16, seed=0):
    random = np.random.default_rng(seed)
    target, latents, error = random.standard_normal((3, count, 4, side, side))
    return target + 0.3 * error, target, latents


# -- the terms, a second time in float64 NumPy -------------------------------------------------------------------------


def estimate(prediction, target, latents):
    return latents - np.sqrt((1 - ALPHAS[TIMESTEP]) / ALPHAS[TIMESTEP]) * (prediction - target)


def weigh_bands(estimated, clean, distance):
    pairs = zip(oracle.wavelet_bands(estimated), oracle.wavelet_bands(clean), strict=True)
    return sum(weight * distance(*pair) for weight, pair in zip((0.7, 0.3), pairs, strict=True))


def moments(estimated, clean):
    def distance(one, other):
        (mean, deviation), (clean_mean, clean_deviation) = [
            (band.mean(axis=(0, 2, 3)), band.std(axis=(0, 2, 3))) for band in (one, other)
        ]
        return np.mean((mean - clean_mean) ** 2 + (deviation - clean_deviation) ** 2)

    return weigh_bands(estimated, clean, distance)


def spectrum(estimated, clean):
    side = estimated.shape[-1]

    def power(latents):
        energy = (np.abs(np.fft.fft2(latents)) ** 2).mean(axis=(0, 1))
        frequencies = np.fft.fftfreq(side)
        rings = [[] for _ in range(side // 2 + 1)]
        for row in range(side):
            for column in range(side // 2 + 1):  # half a spectrum, each of whose entries counts once
                ring = int(np.hypot(frequencies[row], frequencies[column]) * side + 0.5)
                if 0 < ring <= side // 2:
                    rings[ring].append(energy[row, column])
        return np.log([np.mean(ring) + 1e-6 for ring in rings[1:]])

    error = (power(estimated) - power(clean)) ** 2
    low = np.arange(1, side // 2 + 1) / side <= 1 / 8
    return 0.7 * error[low].mean() + 0.3 * error[~low].mean()


def mmd_at(prediction, target, latents):
    """The widths of its kernels belong to the point at which the gradient is taken."""

    def distances(one, other):
        both = np.concatenate([one, other]).reshape(2 * len(one), -1)
        return ((both[:, None] - both[None]) ** 2).sum(axis=-1)

    def lower_median(squares):  # torch's, of an even number
        values = np.sort(squares[~np.eye(len(squares), dtype=bool)])
        return values[(len(values) - 1) // 2]

    starts = zip(
        oracle.wavelet_bands(estimate(prediction, target, latents)), oracle.wavelet_bands(latents), strict=True
    )
    scales = iter([lower_median(distances(*pair)) for pair in starts] * 1000)

    def distance(one, other):
        squares, scale, count = distances(one, other), next(scales), len(one)
        kernel = sum(np.exp(-squares / (factor * scale)) for factor in (0.5, 1, 2))
        return kernel[:count, :count].mean() + kernel[count:, count:].mean() - 2 * kernel[:count, count:].mean()

    return lambda estimated, clean: weigh_bands(estimated, clean, distance)


def band_loss(bands, low_weight=0.7, high_weight=0.3):
    def term(estimated, clean):
        low, high = bands((estimated - clean).sum(axis=0, keepdims=True))
        return low_weight * (low**2).mean() + high_weight * (high**2).mean()

    return term


TERMS = {
    "control: weighted MSE, 10%": lambda estimated, clean: ((estimated - clean) ** 2).mean(),
    "wavelet, 10%": band_loss(oracle.wavelet_bands),
    "fft, 10%": band_loss(oracle.fft_bands),
    "no split, 10%": lambda estimated, clean: 0.5 * ((estimated - clean).sum(axis=0) ** 2).mean(),
    "moments, 10%": moments,
    "spectrum, 10%": spectrum,
    "mmd, 10%": None,
}


def train_one_batch(arm, prediction, target, latents):
    """The calls of a training run with an extra pass; what was added to a base loss of 0, and both gradients."""
    alphas = torch.from_numpy(ALPHAS)
    base, extra = (torch.from_numpy(prediction).requires_grad_() for _ in range(2))
    noise = torch.from_numpy(target)
    term = arm.new_term(0, lambda: torch.from_numpy(latents))
    assert term.plan().extra is not None
    term.extra_pass(Pass(extra, noise, TIMESTEP, alphas), torch.Tensor.backward)
    base_loss = arms.mse(base, noise)
    loss = term.join(Pass(base, noise, TIMESTEP, alphas), base_loss)
    loss.backward()
    return (loss - base_loss).item(), base.grad, extra.grad


@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_of_an_arm_match_an_independent_implementation(name):
    prediction, target, latents = batch()
    term = TERMS[name] or mmd_at(prediction, target, latents)
    arm = arms.all_arms()[name]
    as_it_is = replace(arm, config=replace(arm.config, gradient_ratio=0.0))
    value, _, gradient = train_one_batch(as_it_is, prediction, target, latents)
    assert value == pytest.approx(term(estimate(prediction, target, latents), latents), rel=1e-5)
    chosen = np.random.default_rng(1).choice(prediction.size, size=8, replace=False)
    indices = [np.unravel_index(index, prediction.shape) for index in chosen]
    numeric = oracle.gradient(
        lambda array: term(estimate(array, target, latents), latents), prediction, indices, step=1e-4
    )
    exact = [gradient[index].item() for index in indices]
    np.testing.assert_allclose(exact, numeric, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("name", TERMS)
def test_the_gradient_of_an_arm_has_the_ratio_of_its_name(name):
    _, base, extra = train_one_batch(arms.all_arms()[name], *batch())
    assert (extra.norm() / base.norm()).item() == pytest.approx(0.1, rel=1e-5)


def test_a_statistic_that_is_not_finite_stops_the_run():
    term = replace(arms.all_arms()["moments, 10%"], statistic=lambda passed, clean: passed.prediction.sum() * np.inf)
    with pytest.raises(FloatingPointError, match="step 7"):
        settle_after_one_batch(term)


def settle_after_one_batch(arm):
    prediction, target, latents = map(torch.from_numpy, batch())
    term = arm.new_term(0, lambda: latents)
    passed = Pass(prediction.requires_grad_(), target, TIMESTEP, torch.from_numpy(ALPHAS))
    term.join(passed, arms.mse(prediction, target))
    term.settle(7)


def test_the_placebo_is_plain_mse():
    prediction, target, _ = map(torch.from_numpy, batch())
    prediction.requires_grad_()
    loss = arms.haar_mse(prediction, target)
    loss.backward()
    torch.testing.assert_close(loss, arms.mse(prediction, target))
    torch.testing.assert_close(prediction.grad, (2 * (prediction - target) / prediction.numel()).detach())


def test_the_arms_that_the_study_promises_are_there():
    names = list(arms.all_arms())
    assert names[0] == report.PLAIN
    assert arms.PLACEBO in names
    assert {f"{method}, {size}" for method in ("wavelet", "fft") for size in ("0.003", "5%", "10%", "20%")} < {*names}
    assert {"plain MSE, twice the steps", "wavelet shared, 10%", *TERMS} < {*names}


# -- the metrics ---------------------------------------------------------------------------------------------------


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    generator = torch.Generator().manual_seed(0)
    same = [metrics.kernel_distance(*torch.randn(2, 40, 16, generator=generator)) for _ in range(60)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 60**0.5
    assert min(same) < 0 < max(same)  # a biased one would never be below 0
    shifted = metrics.kernel_distance(
        *(torch.randn(2, 40, 16, generator=generator) + torch.tensor([0.0, 3.0])[:, None, None])
    )
    assert shifted > 10 * np.std(same)


def test_sliced_wasserstein_of_a_shift_is_its_length_along_the_directions():
    latents = torch.randn(32, 4, 16, 16)
    distances = metrics.sliced_wasserstein(latents, latents + 1.0)
    # A shift d in n dimensions is |d|·|cos| along a random direction, on average sqrt(2/pi) of |d|/sqrt(n).
    for name, band in zip(("low", "high"), oracle.wavelet_bands(np.ones((1, 4, 16, 16))), strict=True):
        root_mean_square = np.sqrt((band**2).mean())
        assert distances[f"wasserstein {name}"] == pytest.approx((2 / np.pi) ** 0.5 * root_mean_square, rel=0.15)
    assert metrics.sliced_wasserstein(latents, latents) == {"wasserstein low": 0.0, "wasserstein high": 0.0}


def test_spectral_distances_of_a_scaled_set():
    images = torch.rand(4, 3, 128, 128)
    for value in metrics.spectral_distances(images, 2 * images).values():
        assert value == pytest.approx(6.02, abs=0.01)


@pytest.mark.parametrize("style", ["frames", "weave"])
def test_attributes_of_drawn_images_are_those_of_their_scenes(style):
    scenes, images = trial.draw_scenes((1,), 20, style)
    fractions = metrics.attributes(images, scenes, style)
    assert fractions.pop("style") == pytest.approx(1.0, abs=1e-6)
    assert set(fractions.values()) == {1.0}
    others, _ = trial.draw_scenes((2,), 20, style)
    assert metrics.attributes(images, others, style)["structure"] < 0.5
    _, plain = trial.draw_scenes((1,), 20, "base")
    assert metrics.attributes(plain, scenes, style)["style"] < 0.4


def test_memorization_is_below_one_for_copies():
    training, validation, new = torch.rand(3, 12, 3, 32, 32)
    copies = (training[:6] + 0.01 * torch.randn(6, 3, 32, 32)).clamp(0, 1)
    assert metrics.memorization(copies, training, validation) < 0.1
    assert metrics.memorization(new, training, validation) == pytest.approx(1, abs=0.05)


# -- the statistics ----------------------------------------------------------------------------------------------------


def results(effect, noise=0.01, pairs=5):
    """Trials of plain MSE and of one arm that differs by ``effect`` in the validation loss."""
    random, trials = np.random.default_rng(0), []
    for style in ("frames", "weave"):
        for seed in range(pairs):
            level = random.uniform()  # which the pairs have in common
            for arm, shift in ((report.PLAIN, 0.0), ("arm", effect)):
                measured = {name: level + noise * random.standard_normal() for name in report.METRICS}
                measured["validation loss"] += shift
                trials.append(
                    {"arm": arm, "style": style, "seed": seed, "steps": 1, "gradient_ratio": 0.1, "metrics": measured}
                )
    return trials


def test_only_what_differs_is_marked():
    line = next(line for line in report.tables(results(-0.05)).splitlines() if line.startswith("| arm | 10.0%"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2].endswith(" ++")
    assert not any(cell.endswith("++") or cell.endswith("--") for cell in cells[3:])
    line = next(line for line in report.tables(results(+0.05)).splitlines() if line.startswith("| arm | 10.0%"))
    assert line.split("|")[3].strip().endswith(" --")
    # A constant difference below what the table shows is not marked.
    assert " +" not in report.tables(results(-1e-6, noise=0.0)).split("interval excludes 0")[1].replace("+0.", "")


def test_results_survive_a_round_trip(tmp_path):
    trials = results(0.1, pairs=2)
    report.write(trials, tmp_path / "results.csv")
    for kept, expected in zip(report.read(tmp_path / "results.csv"), trials, strict=True):
        assert kept["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
        assert {**kept, "metrics": None} == {**expected, "metrics": None}


@pytest.mark.parametrize(("file", "table"), [("results.csv", report.tables), ("retest.csv", report.summary)])
def test_the_study_shows_what_was_measured(file, table):
    """The tables of its README are those of the trials that lie beside it."""
    trials = report.read(STUDY / file)
    if file == "results.csv":
        assert {trial["arm"] for trial in trials} == {*PUBLISHED, *arms.all_arms()}
    assert len({trial["seed"] for trial in trials}) >= 5
    text = (STUDY / "README.md").read_text(encoding="utf-8")
    missing = [line for line in table(trials).splitlines() if line not in text]
    assert not missing


# -- one trial ---------------------------------------------------------------------------------------------------------


def test_a_trial_is_reproducible_kept_and_paired(tmp_path, monkeypatch):
    """Three arms for two steps; plain MSE and the placebo differ by rounding alone."""
    for name, value in {"PROMPTS": 4, "REAL": 8, "TRAINING": 8, "SAMPLER_STEPS": 2, "TIMESTEPS": (300,)}.items():
        monkeypatch.setattr(trial, name, value)

    def run(arm, folder):
        folder.mkdir(exist_ok=True)
        return trial.run(trial.Trial(arm, 3, "weave", 2), folder)

    first = {name: run(name, tmp_path / "first") for name in (report.PLAIN, arms.PLACEBO, "wavelet, 10%")}
    again = run("wavelet, 10%", tmp_path / "again")
    assert again["metrics"] == first["wavelet, 10%"]["metrics"]
    assert first["wavelet, 10%"]["gradient_ratio"] == pytest.approx(0.1, rel=0.6)
    plain, placebo, wavelet = (result["metrics"] for result in first.values())
    assert placebo == pytest.approx(plain, rel=1e-2, abs=1e-3)
    assert wavelet["validation loss"] != plain["validation loss"]
    assert report.METRICS.keys() <= plain.keys()
    monkeypatch.setattr(trial, "ArmTraining", None)  # a finished trial is not trained again
    assert run(report.PLAIN, tmp_path / "first") == first[report.PLAIN]
    assert "| wavelet, 10% |" in report.tables(list(first.values()))  # a single pair has no interval
