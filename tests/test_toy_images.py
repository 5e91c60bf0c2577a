"""The toy model's images: what is drawn is what is measured, and structure and texture are independent."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from freq_loss_plugin import frequency_decomposition
from freq_loss_plugin.toy_model.attributes import measure
from freq_loss_plugin.toy_model.scenes import (
    CAPTIONED,
    SHAPES,
    STYLES,
    TEXTURES,
    Scene,
    coverage,
    draw,
    random_scene,
    texture,
)


def scenes(count, seed=0):
    generator = np.random.default_rng(seed)
    return [random_scene(generator) for _ in range(count)]


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_every_attribute_is_measured_as_drawn(noise):
    generator = np.random.default_rng(1)
    for scene in scenes(150):
        image = draw(scene) + generator.normal(0, noise, (128, 128, 3))
        measured = measure(np.clip(image, 0, 1).astype(np.float32))
        assert measured == {name: getattr(scene, name) for name in CAPTIONED}


def test_an_image_without_a_shape_has_none():
    measured = measure(np.full((128, 128, 3), 0.62, dtype=np.float32))
    assert measured["shape"] == measured["color"] == measured["position"] == "none"
    assert measured["background"] == "light grey"
    assert measured["texture"] == "no pattern"


def test_the_attributes_are_drawn_independently_and_uniformly():
    drawn = scenes(4000)
    for name, options in (("shape", SHAPES), ("texture", TEXTURES)):
        counts = [sum(getattr(scene, name) == option for scene in drawn) for option in options]
        assert max(counts) / min(counts) < 1.25
    together = [sum(s.shape == shape and s.texture == kind for s in drawn) for shape in SHAPES for kind in TEXTURES]
    assert max(together) / min(together) < 1.7


def test_the_same_scene_is_the_same_image_and_every_attribute_shows():
    scene = scenes(1)[0]
    assert np.array_equal(draw(scene), draw(scene))
    for name in CAPTIONED:
        others = [other for other in scenes(50) if getattr(other, name) != getattr(scene, name)]
        changed = dataclasses.replace(scene, **{name: getattr(others[0], name)})
        assert not np.array_equal(draw(changed), draw(scene))
        assert changed.caption() != scene.caption()


@pytest.mark.parametrize("style", STYLES)
def test_images_are_in_range_and_nothing_is_clipped_away(style):
    for scene in scenes(30):
        image = draw(scene, style)
        assert image.shape == (128, 128, 3)
        assert image.dtype == np.float32
        assert image.min() >= 0
        assert image.max() <= 1
    plain = draw(dataclasses.replace(scenes(1)[0], background="white", texture="checks"))
    assert (plain == 1).mean() < 0.01


def bands_of(image):
    """Bands of an image that meet where those of its 16×16 latent do: J = 2 there, J = 5 in pixels."""
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    return frequency_decomposition(tensor, J=5)


def test_textures_live_in_the_high_band_and_shapes_mostly_in_the_low_one():
    for scene in scenes(20):
        if scene.texture == "no pattern":
            continue
        waves = np.repeat(texture(scene)[..., None], 3, axis=-1)
        low, high = bands_of(waves)
        assert low.square().sum() < 0.1 * high.square().sum()
        shape = np.repeat(coverage("circle", (0.5, 0.5), scene.radius)[..., None], 3, axis=-1)
        low, high = bands_of(shape)
        assert low.square().sum() > high.square().sum()


def test_each_style_changes_its_own_band():
    """Against the base style, frames changes the low band more than weave does; weave changes the texture alone."""
    changes = {style: [] for style in STYLES[1:]}
    for scene in scenes(20):
        for style, fractions in changes.items():
            low, high = bands_of(draw(scene, style) - draw(scene))
            fractions.append((low.square().sum() / (low.square().sum() + high.square().sum())).item())
    assert np.mean(changes["frames"]) > 3 * np.mean(changes["weave"])
    assert np.mean(changes["weave"]) < 0.2


def test_wrong_words_are_named():
    scene = scenes(1)[0]
    with pytest.raises(ValueError, match=r"'blob'.*'circle'"):
        draw(dataclasses.replace(scene, shape="blob"))
    with pytest.raises(ValueError, match=r"'fur'.*'checks'"):
        draw(dataclasses.replace(scene, texture="fur"))
    with pytest.raises(ValueError, match=r"'cubist'.*'frames'"):
        draw(scene, "cubist")


def test_captions():
    scene = Scene("circle", "red", "at the top left", "white", "checks")
    assert scene.caption() == "a red circle at the top left on white with checks"
    assert scene.caption("weave") == "a red circle at the top left on white with checks, weave style"
