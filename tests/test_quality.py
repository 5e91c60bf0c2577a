"""The study behind "Does it help?": arms against NumPy, instruments on known sets, statistics, and one trial."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "quality"))

import arms
import metrics
import report
import trial

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
        found = [(band.mean(axis=(0, 2, 3)), band.std(axis=(0, 2, 3))) for band in (one, other)]
        return np.mean((found[0][0] - found[1][0]) ** 2 + (found[0][1] - found[1][1]) ** 2)

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


def ours(bands, low_weight=0.7, high_weight=0.3):
    def term(estimated, clean):
        low, high = bands((estimated - clean).sum(axis=0, keepdims=True))
        return low_weight * (low**2).mean() + high_weight * (high**2).mean()

    return term


TERMS = {
    "control: weighted MSE, 10%": lambda estimated, clean: ((estimated - clean) ** 2).mean(),
    "wavelet, 10%": ours(oracle.wavelet_bands),
    "fft, 10%": ours(oracle.fft_bands),
    "no split, 10%": lambda estimated, clean: 0.5 * ((estimated - clean).sum(axis=0) ** 2).mean(),
    "moments, 10%": moments,
    "spectrum, 10%": spectrum,
    "mmd, 10%": None,
}


@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_of_an_arm_are_those_of_an_independent_implementation(name):
    prediction, target, latents = batch()
    term = TERMS[name] or mmd_at(prediction, target, latents)
    tensors = (torch.from_numpy(each) for each in (prediction, target, latents))
    value, gradient = arms.gradient_of(
        arms.all_arms()[name].term, arms.Batch(*tensors, TIMESTEP, torch.from_numpy(ALPHAS))
    )
    assert value.item() == pytest.approx(term(estimate(prediction, target, latents), latents), rel=1e-5)
    chosen = np.random.default_rng(1).choice(prediction.size, size=8, replace=False)
    indices = [np.unravel_index(index, prediction.shape) for index in chosen]
    numeric = oracle.gradient(
        lambda array: term(estimate(array, target, latents), latents), prediction, indices, step=1e-4
    )
    found = [gradient[index].item() for index in indices]
    np.testing.assert_allclose(found, numeric, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


def test_the_sham_is_plain_mse():
    prediction, target, latents = (torch.from_numpy(each) for each in batch())
    of = arms.Batch(prediction, target, latents, TIMESTEP, torch.from_numpy(ALPHAS))
    value, gradient = arms.gradient_of(arms.sham, of)
    torch.testing.assert_close(value, (prediction - target).square().mean())
    torch.testing.assert_close(gradient, 2 * (prediction - target) / prediction.numel())


def test_the_arms_that_the_study_promises_are_there():
    found = arms.all_arms()
    assert next(iter(found)) == report.PLAIN
    held = {(method, share) for method in ("wavelet", "fft") for share in ("0.003", "5%", "10%", "20%")}
    assert {f"{method}, {share}" for method, share in held} <= found.keys()
    assert {"no split, 10%", "wavelet shared, 10%", "moments, 10%", "spectrum, 10%", "mmd, 10%"} <= found.keys()
    assert found["wavelet shared, 10%"].passes == "shared"
    assert found["plain MSE, twice the steps"].length == 2


# -- the instruments ---------------------------------------------------------------------------------------------------


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
    found = metrics.sliced_wasserstein(latents, latents + 1.0)
    # A shift d in n dimensions is |d|·|cos| along a random direction, on average sqrt(2/pi) of |d|/sqrt(n).
    for name, band in zip(("low", "high"), oracle.wavelet_bands(np.ones((1, 4, 16, 16))), strict=True):
        root_mean_square = np.sqrt((band**2).mean())
        assert found[f"wasserstein {name}"] == pytest.approx((2 / np.pi) ** 0.5 * root_mean_square, rel=0.15)
    assert metrics.sliced_wasserstein(latents, latents) == {"wasserstein low": 0.0, "wasserstein high": 0.0}


def test_spectral_distances_of_a_scaled_set():
    pictures = torch.rand(4, 3, 128, 128)
    for value in metrics.spectral_distances(pictures, 2 * pictures).values():
        assert value == pytest.approx(6.02, abs=0.01)


@pytest.mark.parametrize("style", ["frames", "weave"])
def test_attributes_of_drawn_pictures_are_those_of_their_scenes(style):
    scenes, pictures = trial.draw_scenes((1,), 20, style)
    found = metrics.attributes(pictures, scenes, style)
    assert found.pop("style") == pytest.approx(1.0, abs=1e-6)
    assert set(found.values()) == {1.0}
    others, _ = trial.draw_scenes((2,), 20, style)
    assert metrics.attributes(pictures, others, style)["structure"] < 0.5
    _, plain = trial.draw_scenes((1,), 20, "base")
    assert metrics.attributes(plain, scenes, style)["style"] < 0.4


def test_memorisation_is_below_one_for_copies():
    training, held_out, fresh = torch.rand(3, 12, 3, 32, 32)
    copies = (training[:6] + 0.01 * torch.randn(6, 3, 32, 32)).clamp(0, 1)
    assert metrics.memorisation(copies, training, held_out) < 0.1
    assert metrics.memorisation(fresh, training, held_out) == pytest.approx(1, abs=0.05)


# -- the statistics ----------------------------------------------------------------------------------------------------


def results(effect, noise=0.01, pairs=5):
    """Trials of plain MSE and of one arm that differs by ``effect`` in the held-out loss."""
    random, found = np.random.default_rng(0), []
    for style in ("frames", "weave"):
        for seed in range(pairs):
            level = random.uniform()  # which the pairs have in common
            for arm, shift in ((report.PLAIN, 0.0), ("arm", effect)):
                measures = {name: level + noise * random.standard_normal() for name in (*report.MAIN, *report.BESIDES)}
                measures["held-out loss"] += shift
                found.append(
                    {"arm": arm, "style": style, "seed": seed, "steps": 1, "mean_share": 0.1, "metrics": measures}
                )
    return found


def test_paired_differences_are_students():
    trials = results(-0.05)
    values = {(each["arm"], each["style"], each["seed"]): each["metrics"]["held-out loss"] for each in trials}
    pairs = [(style, seed) for style in ("frames", "weave") for seed in range(5)]
    changes = np.array([values[("arm", *pair)] - values[(report.PLAIN, *pair)] for pair in pairs])
    found = report.differences(trials)["arm"]["held-out loss"]
    test = stats.ttest_1samp(changes, 0.0)
    interval = test.confidence_interval(0.95)
    assert found.mean == pytest.approx(changes.mean())
    assert found.p == pytest.approx(test.pvalue)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(tuple(interval))


def test_what_differs_is_marked_and_what_does_not_is_not():
    (line,) = [line for line in report.tables(results(-0.05)).splitlines() if line.startswith("| arm | 10.0%")][:1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2].endswith(" ++")
    assert not any(cell.endswith("++") or cell.endswith("--") for cell in cells[3:])
    (line,) = [line for line in report.tables(results(+0.05)).splitlines() if line.startswith("| arm | 10.0%")][:1]
    assert line.split("|")[3].strip().endswith(" --")
    # A difference of rounding is none, however regular.
    assert " +" not in report.tables(results(-1e-6, noise=0.0)).split("interval excludes 0")[1].replace("+0.", "")


def test_results_are_read_as_they_were_written(tmp_path):
    trials = results(0.1, pairs=2)
    report.write(trials, tmp_path / "results.csv")
    for found, expected in zip(report.read(tmp_path / "results.csv"), trials, strict=True):
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
        assert {**found, "metrics": None} == {**expected, "metrics": None}


@pytest.mark.parametrize(
    ("file", "results", "made"),
    [
        ("README.md", "results.csv", report.summary),
        ("README.zh.md", "results.csv", report.summary),
        ("benchmarks/quality/README.md", "results.csv", report.tables),
        ("benchmarks/quality/README.md", "retest.csv", report.summary),
    ],
)
def test_the_documents_show_what_was_measured(file, results, made):
    """Their tables are made of the trials that are kept beside the study."""
    root = Path(__file__).resolve().parents[1]
    trials = report.read(root / "benchmarks" / "quality" / results)
    if results == "results.csv":
        assert {each["arm"] for each in trials} == {*PUBLISHED, *arms.all_arms()}
    assert len({each["seed"] for each in trials}) >= 5
    text = (root / file).read_text(encoding="utf-8")
    missing = [line for line in made(trials).splitlines() if line not in text]
    assert not missing


def test_holms_correction_is_the_step_down_one():
    def found(*values):
        names = list(report.MAIN)
        every = {name: report.Difference(1.0, 0.1, 1.0) for name in names}
        every |= {name: report.Difference(1.0, 0.1, p) for name, p in zip(names, values, strict=False)}
        return report.holm({"arm": every})

    count = len(report.MAIN)
    assert len(found(0.05 / count, 0.05 / (count - 1), 0.05 / (count - 2))) == 3
    assert len(found(0.05 / count, 0.051 / (count - 1), 0.05 / (count - 2))) == 1  # the third does not get its turn
    assert found(0.051 / count) == set()


# -- one trial ---------------------------------------------------------------------------------------------------------


def test_a_trial_is_reproducible_kept_and_paired(tmp_path, monkeypatch):
    """Three arms for two steps; plain MSE and the sham differ by rounding alone."""
    for name, value in {"PROMPTS": 4, "REAL": 8, "TRAINING": 8, "SAMPLER_STEPS": 2, "TIMESTEPS": (300,)}.items():
        monkeypatch.setattr(trial, name, value)

    def run(arm, folder):
        folder.mkdir(exist_ok=True)
        return trial.run(trial.Trial(arm, 3, "weave", 2), folder)

    first = {
        name: run(name, tmp_path / "first") for name in (report.PLAIN, "sham (MSE as a wavelet loss)", "wavelet, 10%")
    }
    again = run("wavelet, 10%", tmp_path / "again")
    assert again["metrics"] == first["wavelet, 10%"]["metrics"]
    assert first["wavelet, 10%"]["mean_share"] == pytest.approx(0.1, rel=0.6)
    plain, sham, ours = (each["metrics"] for each in first.values())
    assert sham == pytest.approx(plain, rel=1e-2, abs=1e-3)
    assert ours["held-out loss"] != plain["held-out loss"]
    assert set(report.MAIN) | set(report.BESIDES) <= plain.keys()
    monkeypatch.setattr(trial, "train", None)  # what is there is not trained again
    assert run(report.PLAIN, tmp_path / "first") == first[report.PLAIN]
    assert "| wavelet, 10% |" in report.tables(list(first.values()))  # of one pair nothing is said to differ
