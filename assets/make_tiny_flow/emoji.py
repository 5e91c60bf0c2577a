"""Drawn emoji as captioned images: the same concepts by several hands.

The packages are fetched by name with npm. None of their files belongs to this repository.

- google: `emoji-datasource-google` (MIT; the art is Noto Emoji, Apache-2.0), what the base model is trained on
- twitter: `emoji-datasource-twitter` (MIT; the art is Twemoji, CC-BY 4.0)
- openmoji, line art: `openmoji`, in color and in black (CC-BY-SA 4.0)
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image

SIDE = 64
PACKAGES = {
    "google": "emoji-datasource-google@16.0.0",
    "twitter": "emoji-datasource-twitter@16.0.0",
    "openmoji": "openmoji@17.0.0",
}
STYLES = ("google", "twitter", "openmoji", "line art")
# Neither people, which differ by skin tone alone, nor flags and symbols, which are letters and lines.
CATEGORIES = (
    "Smileys & Emotion",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
)
DEFAULT_FOLDER = Path.home() / ".cache" / "freq_loss_plugin" / "emoji"


@dataclass(frozen=True)
class Concept:
    """One thing that is drawn.

    Attributes:
        name: in lowercase, the caption.
        code: its code points, which name the files.
        category: a subcategory of Unicode's, like ``animal-mammal``.
    """

    name: str
    code: str
    category: str

    def caption(self, style: str = "google") -> str:
        """The words for an image of it."""
        return self.name if style == "google" else f"{self.name}, {style} style"


def fetch(folder: Path = DEFAULT_FOLDER) -> Path:
    """Fetch and unpack the packages where that has not been done; returns ``folder``.

    Raises:
        SystemExit: npm is missing.
        subprocess.CalledProcessError: npm failed.
    """
    if shutil.which("npm") is None and not all((folder / name).is_dir() for name in PACKAGES):
        raise SystemExit("the emoji come from npm packages: install Node.js, which has npm")
    folder.mkdir(parents=True, exist_ok=True)
    for name, package in PACKAGES.items():
        if not (folder / name).is_dir():
            done = subprocess.run(
                ["npm", "pack", "--silent", package], cwd=folder, check=True, text=True, stdout=subprocess.PIPE
            )
            archive, part = folder / done.stdout.split()[-1], folder / f"{name}.part"
            with tarfile.open(archive) as opened:
                opened.extractall(part, filter="data")
            archive.unlink()
            part.rename(folder / name)
    return folder


def concepts(folder: Path) -> list[Concept]:
    """All concepts that every package has, in an order that mixes the categories and never changes."""
    listed = json.loads((folder / "google" / "package" / "emoji.json").read_text(encoding="utf-8"))
    found = [
        Concept(each["name"].lower(), each["unified"], each["subcategory"])
        for each in listed
        if each["category"] in CATEGORIES and each["has_img_google"] and each["has_img_twitter"]
    ]
    found = [each for each in found if _drawing(folder, each, "openmoji").is_file()]
    order = np.random.default_rng(0).permutation(len(found))
    return [found[place] for place in order]


def image(folder: Path, concept: Concept, style: str) -> NDArray[np.float32]:
    """The concept on white, shape (64, 64, 3), 0..1."""
    if style in ("google", "twitter"):
        file = folder / style / "package" / "img" / style / "64" / f"{concept.code.lower()}.png"
        opened = Image.open(file)
    else:
        drawing = _drawing(folder, concept, style).read_text(encoding="utf-8")
        opened = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=drawing, width=4 * SIDE))))
    drawn = opened.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
    return np.asarray(flat.resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.float32) / np.float32(255)


def images(folder: Path, some: list[Concept], style: str) -> NDArray[np.float32]:
    """Shape (n, 64, 64, 3), 0..1."""
    return np.stack([image(folder, concept, style) for concept in some])


def _drawing(folder: Path, concept: Concept, style: str) -> Path:
    kind = "black" if style == "line art" else "color"
    code = "-".join(part for part in concept.code.split("-") if part != "FE0F" or "200D" in concept.code)
    return folder / "openmoji" / "package" / kind / "svg" / f"{code}.svg"
