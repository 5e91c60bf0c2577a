"""Draws captioned images of 128×128 pixels in which structure and texture vary independently.

An image is one colored shape at one of five positions on a background whose brightness carries a texture of a known
kind, period and phase. With a VAE of factor 8 and J = 2 wavelet levels, the bands of the 16×16 latent part near a
period of 32 pixels: the shape lies below, the textures (periods of 16 to 22 pixels) above.

Everything follows from a `Scene`; `draw` has no randomness of its own, and `random_scene` takes it from a generator.
The base style is for training a base model. Two more styles are for training LoRAs: ``frames`` changes the structure (a
hollow shape inside a frame of its color) and ``weave`` the texture (basket weave behind, ribs on the shape).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

ImageArray: TypeAlias = NDArray[np.float32]

SIZE = 128

# Saturated shapes on gray backgrounds: whatever is saturated belongs to the shape.
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.10, 0.62, 0.18),
    "blue": (0.13, 0.25, 0.88),
    "yellow": (0.93, 0.83, 0.10),
    "purple": (0.58, 0.14, 0.72),
    "cyan": (0.08, 0.75, 0.80),
}
# Dark and bright enough to tell apart, and far enough from black and white that no texture is clipped.
# Spelled as in the captions that the shipped model was trained on.
BACKGROUNDS: dict[str, float] = {"black": 0.15, "dark grey": 0.38, "light grey": 0.62, "white": 0.85}
SHAPES = ("circle", "square", "triangle", "cross")
# Center of the shape as fractions of the side: (down, right).
POSITIONS: dict[str, tuple[float, float]] = {
    # Spelled as in the captions that the shipped model was trained on.
    "in the centre": (0.50, 0.50),
    "at the top left": (0.27, 0.27),
    "at the top right": (0.27, 0.73),
    "at the bottom left": (0.73, 0.27),
    "at the bottom right": (0.73, 0.73),
}
TEXTURES = ("no pattern", "horizontal stripes", "vertical stripes", "diagonal stripes", "checks")
TEXTURE_AMPLITUDE = 0.12
STYLES = ("base", "frames", "weave")
PERIODS = (16.0, 22.0)


@dataclass(frozen=True)
class Scene:
    """All that an image shows. The first five are in its caption; the others are known all the same.

    Attributes:
        radius: half the extent of the shape, as a fraction of the side.
        period: of the texture, in pixels.
        phase: of the texture, in radians.
    """

    shape: str
    color: str
    position: str
    background: str
    texture: str
    radius: float = 0.17
    period: float = 19.0
    phase: float = 0.0

    def caption(self, style: str = "base") -> str:
        """The words for this scene, for instance ``a red circle at the top left on white with checks``."""
        words = f"a {self.color} {self.shape} {self.position} on {self.background} with {self.texture}"
        return words if style == "base" else f"{words}, {style} style"


# The attributes that a caption names, each with all that it can be.
CAPTIONED_VALUES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
    "texture": TEXTURES,
}
CAPTIONED = tuple(CAPTIONED_VALUES)


def random_scene(generator: np.random.Generator) -> Scene:
    """A scene with every attribute drawn independently and uniformly."""

    def choose(options: object) -> str:
        return str(generator.choice(list(options)))  # type: ignore[call-overload]

    return Scene(
        shape=choose(SHAPES),
        color=choose(COLORS),
        position=choose(POSITIONS),
        background=choose(BACKGROUNDS),
        texture=choose(TEXTURES),
        radius=float(generator.uniform(0.14, 0.20)),
        period=float(generator.uniform(*PERIODS)),
        phase=float(generator.uniform(0, 2 * math.pi)),
    )


def draw(scene: Scene, style: str = "base", size: int = SIZE) -> ImageArray:
    """The image of ``scene``: shape (size, size, 3), float32, 0 to 1.

    Raises:
        KeyError: the scene has a color, position or background that is not in the tables above.
        ValueError: its shape, its texture or the style is none of `SHAPES`, `TEXTURES` and `STYLES`.
    """
    if style not in STYLES:
        raise ValueError(f"style = {style!r}: expected one of {', '.join(map(repr, STYLES))}")
    pattern = _basket_weave(scene, size) if style == "weave" else texture(scene, size)
    background = (BACKGROUNDS[scene.background] + TEXTURE_AMPLITUDE * pattern)[..., None]
    color = np.array(COLORS[scene.color])
    if style == "weave":
        ribs = np.sin(2 * math.pi / 16 * np.arange(size) + scene.phase)
        color = color * (1 + 1.5 * TEXTURE_AMPLITUDE * ribs[None, :, None])
    cover = coverage(scene.shape, POSITIONS[scene.position], scene.radius, size)
    if style == "frames":
        cover = cover - coverage(scene.shape, POSITIONS[scene.position], 0.5 * scene.radius, size)
        cover = np.maximum(cover, frame(size))
    blended = (1 - cover[..., None]) * background + cover[..., None] * color
    return np.clip(blended, 0, 1).astype(np.float32)


def texture(scene: Scene, size: int = SIZE) -> ImageArray:
    """The texture alone, between -1 and 1, of mean about 0."""
    down, right = np.mgrid[:size, :size].astype(np.float64)
    turn = 2 * math.pi / scene.period
    waves: dict[str, Callable[[], NDArray[np.float64]]] = {
        "no pattern": lambda: np.zeros((size, size)),
        "horizontal stripes": lambda: np.sin(turn * down + scene.phase),
        "vertical stripes": lambda: np.sin(turn * right + scene.phase),
        "diagonal stripes": lambda: np.sin(turn * (down + right) / math.sqrt(2) + scene.phase),
        "checks": lambda: np.sin(turn * down + scene.phase) * np.sin(turn * right + scene.phase),
    }
    if scene.texture not in waves:
        raise ValueError(f"texture = {scene.texture!r}: expected one of {', '.join(map(repr, waves))}")
    return waves[scene.texture]().astype(np.float32)


def _basket_weave(scene: Scene, size: int) -> ImageArray:
    """Squares of 32 pixels, striped along and across in turn."""
    down, right = np.mgrid[:size, :size]
    _, period, along = weave_layout(size)
    return np.sin(2 * math.pi / period * np.where(along, down, right) + scene.phase).astype(np.float32)


def weave_layout(size: int = SIZE) -> tuple[int, int, NDArray[np.bool_]]:
    """The side of a square of the basket weave, its period, both in pixels, and where its waves run downwards."""
    side, period = 32, 16
    down, right = np.mgrid[:size, :size]
    return side, period, (down // side + right // side) % 2 == 0


def frame(size: int = SIZE, softness: float = 0.5) -> ImageArray:
    """How much of each pixel a frame along the border covers, a sixteenth of the side and ``softness`` pixels wide."""
    down, right = np.mgrid[:size, :size] + 0.5
    to_the_border = np.minimum.reduce((down, right, size - down, size - right))
    return np.clip(softness - (to_the_border - size / 16), 0, 1).astype(np.float32)


def coverage(shape: str, center: tuple[float, float], radius: float, size: int = SIZE) -> ImageArray:
    """How much of each pixel the shape covers, 0 to 1: its signed distance, softened over one pixel."""
    down, right = np.mgrid[:size, :size] + 0.5
    y, x, r = down - center[0] * size, right - center[1] * size, radius * size
    if shape == "circle":
        distance = np.hypot(x, y) - r
    elif shape == "square":
        distance = np.maximum(abs(x), abs(y)) - 0.88 * r
    elif shape == "triangle":
        sides = (y - 0.6 * r, *(math.sqrt(3) / 2 * s * x - 0.5 * y - 0.6 * r for s in (1, -1)))
        distance = np.maximum.reduce(sides)
    elif shape == "cross":
        arm = 0.36 * r
        upright = np.maximum(abs(x) - arm, abs(y) - r)
        level = np.maximum(abs(y) - arm, abs(x) - r)
        distance = np.minimum(upright, level)
    else:
        raise ValueError(f"shape = {shape!r}: expected one of {', '.join(map(repr, SHAPES))}")
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)
