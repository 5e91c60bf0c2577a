"""What was measured in image files, kept from run to run in one small file of the user's own.

A measurement belongs to a path, the size of the file, its time of change, the size at which it is trained, and the code
that measures. Where one of these is another, the image is measured again; so it is where this file is damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import PIL

from ..atomic_files import write_whole
from .measurement import Measurement
from .trained_image import TrainedImage

# The environment variable that names another folder.
FOLDER = "FREQ_LOSS_CACHE_DIR"
# So many measurements are kept, about 10 MB; the oldest make room.
_MOST = 50_000
# The modules of this folder on which a measurement depends.
_MEASURES = ("defects", "edges", "jpeg", "measurement", "noise", "pixels", "sharpness", "spectrum", "trained_image")

# What reading a damaged file raises.
_DAMAGED = (ValueError, TypeError, KeyError, ArithmeticError)

logger = logging.getLogger(__name__)


def cache_file() -> Path:
    """The file: in the folder that `FOLDER` names, or in the platform's folder for caches."""
    if os.environ.get(FOLDER):
        return Path(os.environ[FOLDER]).expanduser() / "image_quality.json"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # which is to be ignored
        usual = {"win32": "~/AppData/Local", "darwin": "~/Library/Caches"}.get(sys.platform, "~/.cache")
        base = Path(usual).expanduser()
    return base / "freq_loss_plugin" / "image_quality.json"


def keys_of(images: Iterable[TrainedImage]) -> dict[TrainedImage, str]:
    """What the measurements of images are kept under; none for those that are not files."""
    keys = {image: _key(image) for image in images}
    return {image: key for image, key in keys.items() if key is not None}


def read(keys: Mapping[TrainedImage, str]) -> dict[TrainedImage, Measurement]:
    """The measurements that are there."""
    try:
        kept = _load()
        return {image: _measurement(kept[key]) for image, key in keys.items() if key in kept}
    except _DAMAGED as error:
        logger.warning("freq_loss: %s is damaged, so images are measured again: %r", cache_file(), error)
        return {}


def add(keys: Mapping[TrainedImage, str], found: Mapping[TrainedImage, Any]) -> None:
    """Keep measurements; images of which there is none, since they cannot be read, are tried again the next time.

    Args:
        keys: of `keys_of`, from before they were measured.
        found: the measurements.
    """
    new = {keys[image]: asdict(one) for image, one in found.items() if isinstance(one, Measurement) and image in keys}
    if not new:
        return
    with contextlib.suppress(*_DAMAGED):
        new = {key: value for key, value in _load().items() if key not in new} | new
    text = json.dumps(dict(list(new.items())[-max(_MOST, len(keys)) :]), separators=(",", ":"))
    try:
        write_whole(cache_file(), lambda part: part.write_text(text, encoding="utf-8"))
    except (OSError, RuntimeError) as error:
        logger.warning(
            "freq_loss: measurements of images cannot be kept, so they are measured anew in each run: %s; "
            "set %s to a folder that can be written",
            error,
            FOLDER,
        )


def _load() -> dict[str, Any]:
    try:
        kept = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, RuntimeError):  # not there yet; there is no home folder
        return {}
    if not isinstance(kept, dict):
        raise TypeError(f"expected an object, got {type(kept).__name__}")
    return kept


def _measurement(kept: Mapping[str, Any]) -> Measurement:
    tuples = {name: tuple(kept[name]) for name in ("size", "trained", "notes")}
    one = Measurement(**{**kept, **tuples})
    _ = one.defect, "; ".join(one.notes)  # fails now where a value is none that was measured
    return one


def _key(image: TrainedImage) -> str | None:
    try:
        file = os.path.realpath(image.file)  # which, unlike `Path.resolve`, has an answer for links in a circle
        found = Path(file).stat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    place = [os.fsencode(file).hex(), found.st_size, found.st_mtime_ns, image.size, image.part, _code()]
    return hashlib.blake2b(json.dumps(place).encode(), digest_size=16).hexdigest()


@lru_cache(maxsize=1)
def _code() -> str:
    """A hash of what measures."""
    here = Path(__file__).parent
    files = [*(here / f"{name}.py" for name in _MEASURES), here.parent / "image_files.py"]
    contents = b"".join(file.read_bytes() for file in [*files, here.parent / "analysis" / "spectra.py"])
    return hashlib.blake2b(contents + PIL.__version__.encode(), digest_size=16).hexdigest()
