"""Defects in the latents of a real model, by a tiny autoencoder of it, on photos that scikit-image has."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from freq_loss_plugin.image_quality import restoration

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("real_latents", ROOT / "benchmarks" / "real_latents.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["taef1", "taesd"])
def test_a_blur_moves_the_means_and_a_filter_takes_most_of_it_back(benchmark, name):
    folder = Path(pytest.importorskip("skimage").__file__).parent / "data"
    try:
        encoder = benchmark.load_encoder(name, benchmark.CACHE)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    images = [benchmark.middle(folder / photo) for photo in PHOTOS]
    sharp = benchmark.encode(encoder, images)
    assert sharp[0].shape[0] == benchmark.FAMILIES[name].channels
    bad = benchmark.encode(encoder, [benchmark.DEFECTS["a quarter"].apply(image) for image in images])
    fitted = restoration.fit(sharp[:4], bad[:4])
    before, after = ((one - sharp[4]).square().sum() for one in (bad[4], fitted.apply(bad[4])))
    assert after < (0.6 if name == "taef1" else 0.8) * before
    today, _, left, _, floor_before, floor = benchmark.row(sharp, bad, benchmark.FAMILIES[name])
    assert float(left) < (0.5 if name == "taef1" else 0.75)
    assert int(floor) < min(int(today), int(floor_before))
