"""Defects in the latents of real models, by tiny autoencoders of them, on photos that scikit-image has."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from freq_loss_plugin.image_quality import restoration
from freq_loss_plugin.image_quality.defects import Defect
from freq_loss_plugin.image_quality.published import lookup

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("real_latents", ROOT / "benchmarks" / "real_latents.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "left"), [("taef1", 0.4), ("taesd", 0.75), ("taef2", 0.85)])
def test_a_blur_moves_the_means_and_a_filter_takes_a_part_of_it_back(benchmark, name, left):
    """On photos of another kind than those of the published table, which is not far off nevertheless."""
    folder = Path(pytest.importorskip("skimage").__file__).parent / "data"
    try:
        encoder = benchmark.load_encoder(name, benchmark.CACHE)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    family, quarter = benchmark.FAMILIES[name], Defect(resolution=0.25)
    images = [benchmark.middle(folder / photo) for photo in PHOTOS]
    sharp = benchmark.encode(encoder, images)
    assert sharp[0].shape[0] == family.channels
    bad = benchmark.encode(encoder, [quarter.apply(image) for image in images])
    fitted = restoration.fit(sharp[:4], bad[:4])
    before, after = ((one - sharp[4]).square().sum() for one in (bad[4], fitted.apply(bad[4])))
    assert after < left * before
    found = benchmark.effect(sharp, bad, family.model.snr)
    assert found.left < found.left_by_means < 1
    assert found.floor < found.floor_before
    assert list(found.floors) == sorted(found.floors, reverse=True)
    restored, least = lookup(family.key, quarter, benchmark.FRACTION)
    assert 1 - found.left == pytest.approx(restored, abs=0.2)
    assert found.floor == pytest.approx(least, abs=60)
