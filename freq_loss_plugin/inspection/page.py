"""``--html``: one page that needs nothing else, with a sortable table, thumbnails and spectra; and ``--plot``."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from importlib import resources

import numpy as np
from PIL import Image

from .. import image_files
from ..analysis.figures import timesteps_plot
from ..image_quality.pixels import as_pixels
from ..image_quality.spectrum import LEAST_SIDE, fit_power_law
from .findings import FULL, HEADINGS, NOT_KNOWN, Finding

# So many of the worst images have a thumbnail, a spectrum, and a part at full size; a page stays below some 10 MB.
_THUMBNAILS, _SPECTRA, _PARTS = 500, 60, 12
_THUMBNAIL_SIDE, _PART_SIDE = 96, 192
_WIDTH, _HEIGHT = 132, 72
# Of a small plot of a spectrum: powers of ten, and octaves below half a cycle per pixel.
_LOWEST_POWER, _HIGHEST_POWER, _OCTAVES = -8, 2, 7


def render(findings: Sequence[Finding], words: Sequence[str]) -> str:
    """The page.

    Args:
        findings: what was found, worst first.
        words: summary and advice.
    """
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    headings = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{escape(heading)}</button></th>'
        for heading in HEADINGS
    )
    parts = {
        "summary": escape(words[0]),
        "advice": "".join(f"<li>{escape(word)}</li>" for word in words[1:]),
        "headings": f'<th scope="col"></th>{headings}<th scope="col">spectrum</th>',
        "rows": "\n".join(_row(number, finding) for number, finding in enumerate(findings)),
        "parts": "".join(map(_part, [each for each in findings if each.is_bad and each.measured][:_PARTS])),
    }
    for name, text in parts.items():
        template = template.replace(f"<!-- {name} -->", text)
    return template


def plot(findings: Sequence[Finding], model: str) -> Image.Image:
    """The fraction of the images that train at each timestep.

    Args:
        findings: what was found.
        model: the title of the model.

    Raises:
        ImportError: matplotlib is missing.
    """
    pixels = timesteps_plot({model: [each.least for each in findings if each.measured]}, len(findings))
    return Image.fromarray((pixels.numpy() * 255).astype(np.uint8))


def _row(number: int, finding: Finding) -> str:
    cells = [finding.name, *finding.cells(), finding.remark]
    image = _opened(finding) if number < _THUMBNAILS else None
    spectrum = _spectrum(finding, image) if image is not None and number < _SPECTRA else ""
    thumbnail = ""
    if image is not None:
        image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        thumbnail = f'<img src="{_data(image)}" alt="" width="{image.width}" height="{image.height}">'
    texts = "".join(f'<td data-value="{escape(_sortable(cell))}">{escape(cell)}</td>' for cell in cells)
    state = {FULL: "good", NOT_KNOWN: "unknown"}.get(finding.quality, "bad")
    return f'<tr class="{state}"><td>{thumbnail}</td>{texts}<td>{spectrum}</td></tr>'


def _part(finding: Finding) -> str:
    """The middle of an image at the size at which it is trained."""
    image = _opened(finding)
    if image is None or finding.measured is None:
        return ""
    image = image.resize(finding.measured.trained, Image.Resampling.LANCZOS)
    left, top = (max(0, (side - _PART_SIDE) // 2) for side in image.size)
    image = image.crop((left, top, min(image.width, left + _PART_SIDE), min(image.height, top + _PART_SIDE)))
    caption = escape(f"{finding.name}: {finding.measured.defect}")
    return f'<figure><img src="{_data(image)}" alt=""><figcaption>{caption}</figcaption></figure>'


def _spectrum(finding: Finding, image: Image.Image) -> str:
    """A small plot of the power spectrum, and of the power law that it should follow."""
    if finding.measured is None or min(finding.measured.trained) < LEAST_SIDE:
        return ""
    image = image.resize(finding.measured.trained, Image.Resampling.LANCZOS)
    fit = fit_power_law(as_pixels(image), finding.measured.blur)
    frequency = fit.spectrum.frequency.log2().tolist()
    curves = []
    for power, name in ((fit.expected, "expected"), (fit.spectrum.power, "measured")):
        values = power.clamp(min=1e-12).log10().tolist()
        points = {}  # one for each pixel is enough
        for at, value in zip(frequency, values, strict=True):
            height = _HEIGHT * (_HIGHEST_POWER - value) / (_HIGHEST_POWER - _LOWEST_POWER)
            points[round(_WIDTH * (1 + (at + 1) / _OCTAVES))] = round(height, 1)
        text = " ".join(f"{x},{min(max(y, 1), _HEIGHT - 1)}" for x, y in points.items() if x >= 0)
        curves.append(f'<polyline class="{name}" points="{text}"/>')
    label = escape(f"power spectrum of {finding.name}")
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(curves)}</svg>'


def _opened(finding: Finding) -> Image.Image | None:
    if finding.measured is None:
        return None
    return image_files.open_rgb(finding.file)


def _data(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _sortable(cell: str) -> str:
    """What a cell is sorted by: its number, where it begins with one."""
    number = cell.split("x")[0].rstrip("%")
    return number if number.replace(".", "", 1).isdigit() else cell
