"""The studies of balanced losses and imperfect images: arms against NumPy, images, measures, tables."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from PIL import Image

from freq_loss_plugin.training.passes import Pass

pytest.importorskip("statsmodels")
pytest.importorskip("diffusers")
pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("resvg_py")
pytest.importorskip("peft")

from peft.tuners.lora import LoraLayer

from assets.make_tiny_flow import emoji
from benchmarks.what_helps import __main__ as command
from benchmarks.what_helps import arms, images, measures, plots, real_fake, report, training, trial
from benchmarks.what_helps.emoji import EmojiWorld
from benchmarks.what_helps.toy import ToyWorld
from benchmarks.what_helps.world import merged

FOLDER = Path(report.__file__).parent
ALPHAS = oracle.stable_diffusion_alphas_cumprod()
ALL_ARMS = {arm.name: arm for arm in (*arms.BALANCE, *arms.IMPERFECT)}
WORLD = ToyWorld("frames")
CPU = torch.device("cpu")


def a_pass(timesteps=(40, 400, 700, 990), seed=0):
    random = np.random.default_rng(seed)
    target, error = random.standard_normal((2, 4, 4, 16, 16))
    prediction = torch.from_numpy(target + 0.3 * error).requires_grad_()
    return Pass(prediction, torch.from_numpy(target), torch.tensor(timesteps), torch.from_numpy(ALPHAS))


@pytest.mark.parametrize(
    ("weighting", "weight"),
    [
        ("none", np.ones_like),
        ("Haar", np.ones_like),
        ("min-SNR 5", lambda snr: np.minimum(snr, 5) / snr),
        ("debiased", lambda snr: 1 / np.sqrt(np.minimum(snr, 1000))),
    ],
)
def test_losses_of_the_trainers_weightings(weighting, weight):
    passed = a_pass()
    losses = training.losses_of(weighting, passed)
    at = ALPHAS[passed.timesteps.numpy()]
    residual = (passed.prediction - passed.target).detach().numpy()
    expected = weight(at / (1 - at)) * (residual**2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-6)
    losses.sum().backward()
    gradient = 2 * residual / residual[0].size * weight(at / (1 - at))[:, None, None, None]
    np.testing.assert_allclose(passed.prediction.grad.numpy(), gradient, rtol=1e-5, atol=1e-9)


class Recorded(training.ArmTraining):
    """Records the timesteps and the noise of every pass."""

    def _pass(self, chosen, timesteps, generator):
        passed = super()._pass(chosen, timesteps, generator)
        self.passes = [*getattr(self, "passes", []), (chosen, passed.timesteps, passed.target)]
        return passed


def trained(name, tmp_path, *, chosen="varied", steps=3, rate=1e-3):
    arm = ALL_ARMS[name]
    folder = tmp_path / chosen
    folder.mkdir(exist_ok=True)
    captions = images.write(WORLD, chosen, images.MIXTURE, 7, folder)
    trainee = WORLD.new(7, CPU)
    run = Recorded(WORLD, trainee, replace(arm, length=1), captions, seed=7, steps=steps, rate=rate)
    run.run()
    return run, torch.cat([parameter.detach().flatten() for parameter in trainee.parameters])


def test_arms_are_paired_and_the_sham_differs_by_rounding_only(tmp_path):
    plain, weights = trained(arms.PLAIN, tmp_path)
    sham, sham_weights = trained(arms.SHAM, tmp_path)
    band, band_weights = trained("balance by band", tmp_path)
    term, term_weights = trained("distribution term, 10%", tmp_path)
    torch.testing.assert_close(sham_weights, weights, atol=2e-5, rtol=0)
    for other in (band_weights, term_weights):
        assert (other - weights).abs().max() > 1e-4
    base = term.passes[1::2]  # after each extra pass
    for passes in (sham.passes, band.passes, base):
        for (chosen, timesteps, noise), (others, plain_timesteps, plain_noise) in zip(
            passes, plain.passes, strict=True
        ):
            assert chosen == others
            assert torch.equal(timesteps, plain_timesteps)
            assert torch.equal(noise, plain_noise)


@pytest.mark.long
def test_images_with_defects_train_above_their_least_timestep_alone(tmp_path):
    plain, _ = trained(arms.PLAIN, tmp_path, chosen="all", steps=6)
    gated, _ = trained("image quality", tmp_path, chosen="all", steps=6)
    above, _ = trained("min_timestep = 600 for all", tmp_path, chosen="all", steps=6)
    assert not plain.least.any()
    assert not gated.least[: images.SHARP].any()
    assert (gated.least[images.SHARP :] > 100).float().mean() > 0.8
    for (chosen, before, _), (_, after, _), (_, late, _) in zip(plain.passes, gated.passes, above.passes, strict=True):
        least = gated.least[chosen]
        assert (after >= least).all()
        assert torch.equal(after[before >= least], before[before >= least])
        assert (late >= 600).all()
    restored, _ = trained("image quality", tmp_path, chosen="restored")
    assert not restored.least.any()


def test_a_diverged_lora_counts_as_the_base_model(tmp_path):
    _, weights = trained(arms.PLAIN, tmp_path, rate=1e30)
    assert not weights.any()


def decoded(file_content):
    return np.asarray(Image.open(io.BytesIO(file_content)).convert("RGB"), dtype=float)


def test_defects_are_what_they_are_called():
    clean = WORLD.training(3, 1)[0]
    ending, content = images.damaged(clean, None, 0)
    true = decoded(content)
    assert ending == "png"
    assert np.array_equal(true, (clean.pixels.permute(1, 2, 0).numpy() * 255).round())
    energy = np.abs(np.fft.fft2(true.mean(axis=2)))
    for defect in images.DEFECTS:
        ending, content = images.damaged(clean, defect, 0)
        bad = decoded(content)
        assert ending == ("jpg" if defect == "JPEG 10" else "png")
        assert 1 < np.abs(bad - true).mean() < 30
        if defect.startswith("enlarged") or defect == "blur":
            detail = np.s_[16:40, 16:40]
            assert (np.abs(np.fft.fft2(bad.mean(axis=2))) ** 2)[detail].sum() < 0.3 * (energy**2)[detail].sum()
    assert np.std(decoded(images.damaged(clean, "noise", 0)[1]) - true) == pytest.approx(20, rel=0.15)


@pytest.mark.parametrize("style", trial.TOY)
def test_the_true_images_of_the_toy_world_are_judged_right(style):
    world = ToyWorld(style)
    prompts = world.prompts(12)
    judged = world.judge(torch.stack([each.pixels for each in prompts]), prompts)
    assert set(judged) == {"structure", "texture", "background", "style"}
    assert all(value == pytest.approx(1, abs=1e-6) for value in judged.values())
    assert ToyWorld(style).judge(torch.rand(12, 3, 128, 128), prompts)["structure"] < 0.6


def test_the_true_images_of_the_emoji_world_are_judged_right():
    if not (emoji.DEFAULT_FOLDER / "openmoji").is_dir():
        pytest.skip("the emoji have not been fetched")
    world = EmojiWorld("twitter")
    prompts = world.prompts(24)
    judged = world.judge(torch.stack([each.pixels for each in prompts]), prompts)
    assert judged == {"structure": 1.0, "background": pytest.approx(1.0), "style": 1.0}
    others = torch.stack([each.pixels for each in EmojiWorld("google").prompts(24)])
    judged = world.judge(others, prompts)
    assert judged["style"] == 0
    assert judged["structure"] > 0.4
    captions = {each.caption for each in prompts} | {each.caption for each in world.uniform(1, 6)}
    assert captions.isdisjoint(each.caption for each in world.training(1, 18)) or len(captions) == 30


@pytest.mark.parametrize("world", [WORLD, EmojiWorld("twitter")], ids=["toy", "emoji"])
def test_a_merged_lora_does_the_same_and_goes_back(world):
    trainee = world.new(0, CPU)
    for parameter in trainee.parameters:
        torch.nn.init.normal_(parameter, std=0.05)
    model = trainee._model.pipeline.unet if world is WORLD else trainee._model.transformer
    latents, noise = torch.randn(2, 1, 4, 16, 16)

    def predicted(by=trainee):
        return by.predict(latents, torch.tensor([500]), noise, ["a red circle"])[0].detach()

    beside = predicted()
    with merged(model, 1.0):
        assert all(layer.merged for layer in model.modules() if isinstance(layer, LoraLayer))
        within = predicted()
    with merged(model, 0.0):
        without = predicted()
    for same, as_this in ((within, beside), (predicted(), beside), (without, predicted(world.new(1, CPU)))):
        torch.testing.assert_close(same, as_this, rtol=1e-4, atol=1e-5)
    assert (without - beside).abs().max() > 1e-2


def test_samples_are_classified_as_the_plan_says(monkeypatch):
    if not (emoji.DEFAULT_FOLDER / "twitter").is_dir():
        pytest.skip("the emoji have not been fetched")
    monkeypatch.setattr(real_fake, "PER_CLASS", real_fake.POOL)
    task = real_fake.make_task(emoji.concepts(emoji.fetch()), 3)
    assert len(task.pool) == 12
    assert all(len(pool) + len(test) >= 24 for pool, test in zip(task.pool, task.test, strict=True))
    asked = {}

    class Perfect:
        """Draws what the caption says."""

        def sample(self, captions, **how):
            asked.update(how, count=len(captions))
            return real_fake._images(task.pool, "twitter")

    of_samples = real_fake.accuracy_of_samples(Perfect(), task, "twitter", 3)
    assert asked == {"guidance": 2.0, "strength": 1.0, "steps": 10, "first_seed": 30_000, "count": 12 * 16}
    # The same images, seen by the classifier that is trained on real ones alone.
    assert of_samples == real_fake.accuracy_of_real(task, real_fake.POOL, "twitter", 3)
    assert 2 / 12 < of_samples < 1


def test_the_kernel_distance_is_unbiased_and_sees_a_shift():
    generator = torch.Generator().manual_seed(0)
    same = [measures.kernel_distance(*torch.randn(2, 40, 16, generator=generator)) for _ in range(60)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 60**0.5
    shifted = measures.kernel_distance(*(torch.randn(2, 40, 16) + torch.tensor([0.0, 3.0])[:, None, None]))
    assert shifted > 10 * np.std(same)


def row(arm, seed, *, style="frames", **measured):
    values = dict.fromkeys(report.PRIMARY["balance"], "1") | {name: str(value) for name, value in measured.items()}
    return {"arm": arm, "images": style, "defect": "none", "seed": str(seed), "rate": "0.001", **values}


def test_differences_are_paired_and_ratios_are_of_errors():
    rows = [row(arms.PLAIN, seed, structure=seed, validation=0.1 * 2**seed) for seed in range(4)]
    rows += [row("balance by band", seed, structure=seed + 0.5, validation=0.08 * 2**seed) for seed in range(4)]
    rows += [row("balance by band", 9, structure=100)]  # without a partner
    found = report.differences(rows, ("structure", "validation"))
    assert found["toy", "balance by band", "structure"][:2] == (0.5, 0.0)
    assert found["toy", "balance by band", "validation"].mean == pytest.approx(-0.2)
    assert report.differences(rows, ("structure",), "twice the steps") == {}
    assert report.differences(rows, ("texture",)) == {}  # measured in no row


def test_intervals_are_students():
    values = [(1.0, 0.0), (2.0, 0.0), (4.0, 0.0)]
    found = report.difference(values, is_ratio=False)
    # The 97.5% quantile of Student's t with two degrees of freedom is 4.3027.
    assert found.half_width == pytest.approx(4.3027 * np.std([1, 2, 4], ddof=1) / math.sqrt(3), rel=1e-4)


def test_holms_correction_counts_all_comparisons():
    def compared(ps):
        names = [report.Comparison("toy", str(number), "structure") for number in range(len(ps))]
        return {name: report.Difference(1.0, 0.5, p, 9) for name, p in zip(names, ps, strict=True)}

    assert [each.arm for each in report.surviving(compared([0.01, 0.04]))] != []
    assert {each.arm for each in report.surviving(compared([0.01, 0.02, 0.04]))} == {"0", "1", "2"}
    assert report.surviving(compared([0.02, 0.02, 0.5])) == set()


def test_the_best_rate_has_the_least_error_and_styles_of_a_model_share_it():
    rows = [
        {**row("balance by band", 900, style=style, validation=error), "rate": rate}
        for style, rate, error in [
            ("frames", "0.001", 0.2),
            ("frames", "0.002", 0.1),
            ("weave", "0.001", 0.1),
            ("weave", "0.002", 0.15),
            ("twitter", "0.001", 0.5),
            ("twitter", "0.002", 0.6),
        ]
    ]
    best = report.best_rates(rows)
    assert best == {(False, "balance by band"): 0.002, (True, "balance by band"): 0.001}
    with pytest.raises(SystemExit, match="run the study rates first"):
        report.best_rates([])


def test_results_are_appended_and_columns_may_differ(tmp_path):
    file = tmp_path / "balance.csv"
    command._append({"arm": "a", "seed": "1", "texture": "0.5"}, file)
    command._append({"arm": "b", "seed": "1", "fidelity": "0.25"}, file)
    assert report.read(file) == [
        {"arm": "a", "seed": "1", "texture": "0.5", "fidelity": ""},
        {"arm": "b", "seed": "1", "texture": "", "fidelity": "0.25"},
    ]


def test_tables_plots_and_samples_are_written_from_results(tmp_path):
    """One style alone, as with --styles: what the other has and this one lacks is left out."""
    results, samples = tmp_path / "results", tmp_path / "samples"
    results.mkdir()
    samples.mkdir()
    for study, arm in (("balance", "balance by timestep"), ("imperfect", "image quality")):
        rows = [
            dict.fromkeys(report.PRIMARY[study], "1")
            | {"arm": name, "images": "twitter", "defect": "none", "seed": str(seed), "rate": "0.001"}
            | {"structure": str(0.5 + 0.01 * seed + (name == arm) * (0.1 + 0.001 * seed**2))}
            for name in (arms.PLAIN, arm)
            for seed in range(1000, 1004)
        ]
        for each in rows:
            command._append(each, results / f"{study}.csv")
    key = ("image quality", "twitter", "none", "1000", "0.001")
    np.save(samples / report.samples_name("imperfect", key), np.zeros((6, 3, 8, 8), np.uint8))
    command._write(results, samples)
    assert {path.name for path in results.iterdir()} == {
        *(f"{study}.{ending}" for study in ("balance", "imperfect") for ending in ("csv", "md", "png")),
        "imperfect_samples.jpg",
        "main.png",
    }
    labels = [label for label, _ in reversed(plots._lines(plots.MAIN, results))]
    sharp, imperfect = (f"{plots.TITLES[study]}:" for study in ("balance", "imperfect"))
    assert labels == [sharp, "balance by timestep (emoji, flow)", imperfect, "image quality (emoji, flow)"]
    (difference, survives) = plots._lines({"imperfect": ()}, results)[0][1]["structure"]
    assert difference.pairs == 4
    assert survives
    assert plots._lines({"imperfect": ("sharp images alone",)}, results) == []


def test_accuracies_are_shown_and_real_images_are_not_judged():
    """As in the plan: Holm's correction counts the three arms that change the loss."""
    gains = {arms.PLAIN: 0, "distribution term, 10%": 0.01, "balance by band": 0.02, arms.REAL: 0.3}
    rows = [
        {"arm": arm, "images": "twitter", "defect": k, "seed": str(seed), "rate": "0.001"}
        | {"accuracy": str(0.25 + 0.125 * (k == "16") + gain * (1 + 0.1 * seed))}
        for arm, gain in gains.items()
        for k in ("8", "16")
        for seed in range(4)
    ]
    text = report.tables("real_fake", rows)
    assert "over all 2 primary comparisons. 2 intervals exclude 0 (0 would by chance alone); 2 survive" in text
    assert "| balance by band | 8 | +0.023 ± 0.002 ++ |" in text
    assert "| real images alone | 8 | +0.345 ± 0.030 + |" in text
    assert "| 8 | 0.250, 0.000 | 0.273, 0.003 | 0.262, 0.001 | 0.595, 0.039 |" in text
    assert "| 16 | 0.375, 0.000 |" in text


def test_the_trials_are_those_of_the_plan():
    plan = (FOLDER / "plan.md").read_text(encoding="utf-8")
    rates = trial.rate_trials()
    assert {each.seed for each in rates if each.style in ("frames", "twitter")} == {900}
    assert {each.seed for each in rates if each.style in ("weave", "line art")} == {901}
    of_toy = {each.rate for each in rates if each.style in trial.TOY}
    of_emoji = {each.rate for each in rates if each.style in trial.EMOJI}
    assert (of_toy - of_emoji, of_emoji) == ({1.6e-2}, {1e-3, 2e-3, 4e-3, 8e-3})  # the last two by a departure
    best = {(second, arm.name): 1e-3 for second in (False, True) for arm in arms.BALANCE}
    balance = trial.balance_trials(range(1000, 1010), best)
    per_style = {style: {each.arm for each in balance if each.style == style} for style in (*trial.TOY, *trial.EMOJI)}
    assert per_style["frames"] == per_style["weave"] == {arm.name for arm in arms.BALANCE}
    assert per_style["frames"] - per_style["twitter"] == {*arms.DDPM_ONLY}
    assert {each.seed for each in balance if each.arm == arms.SHAM} == {1000, 1001}
    assert len({each.key for each in balance}) == len(balance) == (9 + 9 + 7 + 7) * 10 + 2 * 4
    imperfect = trial.imperfect_trials(range(1000, 1010), best)
    mixed = {each.style for each in imperfect if each.defect == images.MIXTURE}
    assert mixed == {"frames", "twitter"}
    assert len({each.key for each in imperfect}) == len(imperfect) == (2 * 6 + 5 * 3) * 10
    real_fake = trial.real_fake_trials(range(1000, 1010), best)
    assert len({each.key for each in real_fake}) == len(real_fake) == 10 * 2 * 5
    for words in ("900", "901", "1000 to 1009", "1e-3, 2e-3 and 4e-3", "120 steps", "rank 16", "min_timestep` = 600"):
        assert words in plan


def test_the_published_tables_are_those_of_the_results():
    files = [file for file in (FOLDER / "results").rglob("*.csv") if file.stem in trial.STUDIES]
    assert len(files) == 6
    for file in files:
        text = file.with_suffix(".md").read_text(encoding="utf-8")
        assert report.tables(file.stem, report.read(file)) + "\n" == text
        assert not re.search(r"\bnan\b|\binf\b", text)
    for folder in ("repeat", "before/repeat"):
        repeated = report.read(FOLDER / "results" / folder / "imperfect.csv")
        assert Counter(row["arm"] for row in repeated) == dict.fromkeys(
            (arms.PLAIN, "image quality", "image quality, balance by band"), 20
        )
