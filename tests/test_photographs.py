"""The study on photographs: styles, defects, floors, weights, filters, tables, and a trial that is resumed."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("statsmodels")
pytest.importorskip("diffusers")
pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("peft")

from benchmarks.photographs import __main__ as command
from benchmarks.photographs import autoencoders, cell, images, measures, photographs, report, training, trial
from benchmarks.photographs.arms import ALL_SHARP, AS_IN_RUNS, BY_NAME, PLAIN, SHARP_ALONE, WITH_TERM
from benchmarks.photographs.cell import Cell
from benchmarks.photographs.worlds import WORLDS
from freq_loss_plugin.image_files import open_rgb

FLUX, SD = WORLDS["flux"], WORLDS["sd"]
ONE_CELL = "study --worlds flux --styles negative --defects quarter --fractions 0.75 --seeds 1 --first_seed 1"


@pytest.fixture(scope="module")
def data():
    """Photographs and autoencoders, or a reason to skip."""
    try:
        photographs.study_photographs()
        autoencoders.encode("taef1", [gray()])
        autoencoders.decode("taef1", torch.zeros(1, 16, 2, 2))
    except FileNotFoundError as error:
        pytest.skip(str(error))


def gray(value=128, side=64):
    return Image.new("RGB", (side, side), (value,) * 3)


def numbers(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_timesteps_are_drawn_above_their_floor_in_the_shares_of_all(world):
    least = torch.tensor([0.0, 300.0, 900.0, 999.0]).repeat(20000)
    generator = torch.Generator().manual_seed(1)
    timesteps = training.draw(world, least, generator)
    assert (timesteps >= least).all()
    assert timesteps.max() <= 1000
    free = timesteps[least == 0]
    for floor in (300, 900):
        share = float(world.share(torch.tensor(floor)))
        assert float((free >= floor).double().mean()) == pytest.approx(share, abs=0.01)
        # Conditioned on t >= L, what is drawn with the floor has the median of what is drawn without it.
        assert float(timesteps[least == floor].median()) == pytest.approx(float(free[free >= floor].median()), abs=9)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_weights_of_shares_undo_the_floors(world):
    least = torch.tensor([0.0, 0.0, 400.0, 400.0, 700.0, 999.0])
    timesteps = training.draw(world, least.repeat(40000), torch.Generator().manual_seed(2))
    weights = training.share_weights(world, timesteps, least)
    assert float(weights.mean()) == pytest.approx(1, abs=0.01)
    for floor in (200, 500, 800):
        share = float(world.share(torch.tensor(floor)))
        assert float((weights * (timesteps >= floor)).mean()) == pytest.approx(share, abs=0.01)
    assert torch.equal(training.share_weights(world, timesteps, torch.zeros(3)), torch.ones_like(weights))


def test_styles():
    assert np.asarray(images.negative(gray(200), numbers())).mean() == 55
    dots = np.asarray(images.halftone(gray(128, 192), numbers())).astype(float) / 255
    assert dots.mean() == pytest.approx(0.5, abs=0.03)
    assert ((dots < 0.02) | (dots > 0.98)).mean() > 0.5
    spectrum = np.abs(np.fft.fft2(dots[..., 0] - dots[..., 0].mean()))
    row, column = np.unravel_index(spectrum.argmax(), spectrum.shape)
    frequency = np.hypot(*(min(place, 192 - place) / 192 for place in (row, column)))
    assert 1 / frequency == pytest.approx(7, abs=0.3)
    darker = np.asarray(images.halftone(gray(60, 192), numbers())).mean()
    assert darker < 80


@pytest.mark.parametrize("kind", images.NOMINAL)
def test_defects_are_like_what_the_plug_in_is_told(kind):
    noise = numbers(3).integers(0, 256, (192, 192, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((192, 192)).reduce(2).resize((192, 192), Image.Resampling.BICUBIC)
    bad, nominal = images.damaged(image, kind, numbers(4)), images.NOMINAL[kind].apply(image, 1)
    assert bad.size == image.size
    ours, theirs = (np.square(np.asarray(each, float) - np.asarray(image, float)).mean() for each in (bad, nominal))
    assert ours == pytest.approx(theirs, rel=0.6)
    assert not np.array_equal(np.asarray(bad), np.asarray(nominal))


def test_a_mixture_has_every_defect():
    assert {images.kind_of(images.MIXTURE, number) for number in range(18)} == images.NOMINAL.keys()
    assert images.kind_of("blur", 5) == "blur"


@pytest.mark.parametrize("name", ["taef1", "taesd"])
def test_images_come_back_from_latents(data, name):
    image = photographs.half_square(open_rgb(photographs.study_photographs()[30]), numbers())
    back = autoencoders.decode(name, autoencoders.encode(name, [image]))[0]
    difference = back.permute(1, 2, 0).numpy() - np.asarray(image) / 255
    assert 10 * np.log10(1 / np.square(difference).mean()) > 26


def test_floors_fall_with_the_fraction_and_with_what_is_repaired(data):
    prepared = cell.prepare(Cell("flux", "negative", "quarter", 0.75, 1))
    fit = prepared.fits[0]

    def least(name):
        return fit.least(BY_NAME[name], FLUX.snr)

    by_fraction = [least(f"restored, gated at {fraction}%") for fraction in (2, 5, 15)]
    assert by_fraction == sorted(by_fraction, reverse=True)
    assert len(set(by_fraction)) == 3
    assert least("restored, gated at 5%") < least("means moved, gated at 5%") < least("gated at 5%")
    assert least("d'² < 16") == 900
    assert least(PLAIN) == least("restored") == 0


def test_filters_bring_latents_nearer_and_the_means_alone_are_moved(data):
    prepared = cell.prepare(Cell("flux", "negative", "quarter", 0.75, 1))
    sharp = prepared.photographs.sharp[prepared.good :]
    latents = {name: prepared.trained(BY_NAME[name], FLUX.snr)[0][6:] for name in (PLAIN, "means moved", "restored")}
    errors = [float((latents[name] - sharp).square().mean()) for name in latents]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.6 * errors[0]
    moved = latents["means moved"] - latents[PLAIN]
    assert torch.allclose(moved, moved[:1, :, :1, :1].expand_as(moved), atol=1e-4)
    good, least = prepared.trained(BY_NAME[SHARP_ALONE], FLUX.snr)
    assert len(good) == len(least) == 6
    everything, least = prepared.trained(BY_NAME[ALL_SHARP], FLUX.snr)
    assert torch.equal(everything, prepared.photographs.sharp)
    assert not least.any()


def test_validation_of_the_base_model_is_1_and_parts_are_its_bands(data):
    measured = measures.validate(FLUX, training.new_lora(FLUX, 1), "negative", 1)
    assert all(value == pytest.approx(1, abs=1e-5) for value in measured.values())
    assert set(measured) == {*measures.VALIDATION, *measures.ERRORS}


def test_a_trial_is_written_as_it_ends_and_not_repeated(data, tmp_path, monkeypatch):
    (tmp_path / "rates.csv").write_text(
        "world,style,rate,validation\nflux,negative,0.001,0.99\nflux,negative,0.002,0.98\nflux,halftone,0.001,0.9\n"
        "sd,negative,0.001,0.97\nsd,halftone,0.001,0.97\n",
        encoding="utf-8",
    )
    options = [*ONE_CELL.split(), "--steps", "2", "--processes", "1", "--samples", "--results", str(tmp_path), "--arms"]

    def run(*arms):
        monkeypatch.setattr(sys, "argv", ["photographs", *options, *arms])
        command.main()
        return report.read(tmp_path / "study.csv")

    first = run(PLAIN)
    assert [row["arm"] for row in first] == [PLAIN]
    assert {row["rate"] for row in first} == {"0.002"}
    both = run(PLAIN, AS_IN_RUNS)
    assert both[0] == first[0]
    assert [row["arm"] for row in both] == [PLAIN, AS_IN_RUNS]
    assert int(both[1]["least timesteps"]) > 400
    assert float(both[1]["validation"]) != float(both[0]["validation"])
    assert all(math.isfinite(float(row[name])) for row in both for name in measures.NAMES)


def rows_of(values):
    """Rows of a results file with two seeds, whose validation errors are those given by arm, times 1 and 1.01."""
    rows = []
    for arm, value in values.items():
        for seed, factor in (("1", 1.0), ("2", 1.01)):
            at = Cell("flux", "negative", "quarter", 0.75, int(seed))
            key = trial.trial_of(at, arm, 1e-3).key
            rows.append(dict.fromkeys(trial.COLUMNS, "") | dict(zip(trial.KEY, key, strict=True)))
            rows[-1]["validation"] = str(value * factor)
    return rows


def test_tables_have_ratios_and_the_share_of_the_way():
    written = report.tables(rows_of({PLAIN: 1.0, AS_IN_RUNS: 0.92, SHARP_ALONE: 0.95, ALL_SHARP: 0.9}))
    ratios, alone, shares, *_ = written.split("| flux, negative, 75% with a defect |")[1:]
    assert f"| {AS_IN_RUNS} | -0.080 ± 0.000 ++ | -0.080 ± 0.000 + |" in ratios
    assert f"| {AS_IN_RUNS} | -0.032 ± 0.000 + |" in alone
    assert f"| {AS_IN_RUNS} | {math.log(0.92) / math.log(0.9):+.3f} ± 0.000 |" in shares
    assert ALL_SHARP not in shares.split("\n\n")[0]


def test_the_term_is_compared_with_all_images_sharp():
    written = report.tables(rows_of({PLAIN: 1.0, AS_IN_RUNS: 0.92, ALL_SHARP: 0.9, WITH_TERM: 0.81}))
    before, with_term = written.split("against all images sharp without it:")
    assert f"| {WITH_TERM} | -0.100 ± 0.000 + |" in with_term
    assert WITH_TERM not in before


def test_a_trial_that_was_repeated_for_its_samples_counts_once(tmp_path):
    rows = rows_of({PLAIN: 1.0, AS_IN_RUNS: 0.92})
    again = [row | dict.fromkeys(measures.OF_SAMPLES, "0.5") for row in rows[2:]]
    lines = [",".join(trial.COLUMNS), *(",".join(row[name] for name in trial.COLUMNS) for row in (*rows, *again))]
    (tmp_path / "study.csv").write_text("\n".join(lines), encoding="utf-8")
    report.write(tmp_path / "study.csv")
    assert "4 trials, seeds 1 to 2." in (tmp_path / "study.md").read_text(encoding="utf-8")


def test_the_term_changes_a_step_in_its_own_pass_alone():
    steps = {}
    for arm in (ALL_SHARP, WITH_TERM):
        torch.manual_seed(0)
        latents, model = torch.randn(8, 16, 8, 8), training.new_lora(FLUX, 1)
        settings = training.Settings(1, 2, 1e-3, False, BY_NAME[arm].config)
        seen = []
        model.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[1].tolist()))
        training.Training(FLUX, model, latents, torch.zeros(8), settings).run()
        steps[arm] = seen, [each.detach().clone() for each in model.parameters() if each.requires_grad]
    (base, plain), (both, with_term) = steps.values()
    assert both[1::2] == base
    assert all(len(set(extra)) == 1 and 800 <= extra[0] < 1000 for extra in both[::2])
    assert not all(map(torch.equal, plain, with_term))


def test_every_arm_is_told_apart():
    assert len({replace(arm, name="") for arm in BY_NAME.values()}) == len(BY_NAME)


def test_runs_weigh_noise_levels_with_flow_matching_alone():
    found = {name: [BY_NAME[name].is_weighted(flow=flow) for flow in (True, False)] for name in BY_NAME}
    assert found[AS_IN_RUNS] == [True, False]
    assert found["the other weights"] == [False, True]
    assert found["gated at 5%"] == [False, False]
    assert found["gated at 5%, weighted"] == [True, True]
