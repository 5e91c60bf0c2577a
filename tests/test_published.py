"""The published table of what can be restored: complete, monotone, and what is between its levels."""

from __future__ import annotations

import csv
import itertools
import math

import pytest

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.image_quality.defects import Defect
from freq_loss_plugin.image_quality.published import COLUMNS, FILE, FRACTIONS, LEVELS, MODELS, lookup

EVERY = [(model, kind) for model in MODELS for kind in LEVELS]


def rows(model, kind):
    with FILE.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if (row["model"], row["defect"]) == (model, kind)]


def test_the_table_has_every_level_once():
    with FILE.open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    assert tuple(table[0]) == COLUMNS
    expected = [(model, kind, f"{level:.4g}") for model, kind in EVERY for level in LEVELS[kind]]
    assert [tuple(row[:3]) for row in table[1:]] == expected
    assert all(0 <= float(row[3]) <= 1 for row in table[1:])


@pytest.mark.parametrize(("model", "kind"), EVERY)
def test_floors_rise_with_the_defect_and_fall_with_the_fraction(model, kind):
    floors = [[int(row[str(fraction)]) for fraction in FRACTIONS] for row in rows(model, kind)]
    assert all(row == sorted(row, reverse=True) for row in floors)
    assert all(list(column) == sorted(column) for column in zip(*floors, strict=True))
    assert all(0 <= least <= 1000 for row in floors for least in row)
    assert floors[-1][2] > floors[0][2]


@pytest.mark.parametrize(("model", "kind"), EVERY)
def test_at_a_level_and_a_fraction_of_the_table_it_is_the_table(model, kind):
    for row, level in zip(rows(model, kind), LEVELS[kind], strict=True):
        for fraction in FRACTIONS:
            restored, least = lookup(model, Defect(**{kind: level}), fraction)
            assert restored == pytest.approx(float(row["restored"]), abs=2e-3)
            assert least == pytest.approx(int(row[str(fraction)]), abs=1)


def test_between_levels_and_fractions_both_are_interpolated():
    """Along log(resolution), quality, log(noise) and log(fraction): the middle of two is their mean."""
    middles = {"resolution": (1 / 8, 1 / 6, math.sqrt(1 / 48)), "jpeg": (10, 20, 15), "noise": (10, 20, math.sqrt(200))}
    for model, (kind, (one, other, between)) in itertools.product(MODELS, middles.items()):
        ends = [lookup(model, Defect(**{kind: level}), 0.05) for level in (one, other)]
        restored, least = lookup(model, Defect(**{kind: between}), 0.05)
        assert restored == pytest.approx((ends[0][0] + ends[1][0]) / 2, abs=2e-3)
        assert least == pytest.approx((ends[0][1] + ends[1][1]) / 2, abs=1.5)
    floors = [lookup("flux1", Defect(jpeg=10), fraction)[1] for fraction in (0.1, math.sqrt(0.02), 0.2)]
    assert floors[1] == pytest.approx((floors[0] + floors[2]) / 2, abs=1.5)
    assert floors[0] > floors[2]
    assert lookup("flux1", Defect(jpeg=10), 1e-9) == lookup("flux1", Defect(jpeg=10), 0.01)
    default = lookup("flux1", Defect(jpeg=10))
    assert default == lookup("flux1", Defect(jpeg=10), FreqLossConfig.image_quality_threshold)


@pytest.mark.parametrize("model", MODELS)
def test_milder_than_the_table_goes_to_nothing_and_worse_counts_as_its_worst(model):
    assert lookup(model, Defect(), 0.05) == (0, 0)
    mild = [Defect(resolution=0.75), Defect(jpeg=95), Defect(noise=2.0)]
    mildest = [Defect(**{kind: levels[0]}) for kind, levels in LEVELS.items()]
    for one, other in zip(mild, mildest, strict=True):
        assert 0 < lookup(model, one, 0.05)[1] < lookup(model, other, 0.05)[1]
    assert lookup(model, Defect(noise=0.5), 0.05) == (0, 0)
    worst = [Defect(**{kind: levels[-1]}) for kind, levels in LEVELS.items()]
    for one, other in zip([Defect(resolution=1 / 20), Defect(jpeg=5), Defect(noise=90.0)], worst, strict=True):
        assert lookup(model, one, 0.05) == pytest.approx(lookup(model, other, 0.05), abs=2e-3)


def test_of_several_defects_the_worst_counts():
    both = lookup("flux1", Defect(resolution=0.25, jpeg=30, jpeg_scale=2.0), 0.05)
    blur, compression = lookup("flux1", Defect(resolution=0.25), 0.05), lookup("flux1", Defect(jpeg=30), 0.05)
    assert blur != compression
    assert both == (min(blur[0], compression[0]), max(blur[1], compression[1]))
