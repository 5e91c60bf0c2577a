"""An image of a run at the size at which it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .. import image_files
from .measurement import Measurement, Size, measure_file


@dataclass(frozen=True)
class TrainedImage:
    """An image file at one size; two data sets can train one file at two sizes.

    Attributes:
        file: the file.
        size: width and height to which it is resized before it is cropped; its own where None.
    """

    file: Path
    size: Size | None = None

    @property
    def part(self) -> str:
        """What of the file it is; "" for all of it."""
        return ""

    def open(self) -> Image.Image:
        """The image as RGB, at the size of its file.

        Raises:
            OSError: it cannot be read.
        """
        return image_files.open_rgb(self.file)

    def measure(self) -> Measurement:
        """What is wrong with it.

        Raises:
            OSError: it cannot be read.
        """
        return measure_file(self.file, self.size)
