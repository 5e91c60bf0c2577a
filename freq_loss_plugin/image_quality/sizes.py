"""The size at which an image is trained: as sd-scripts and musubi-tuner choose it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ..options.fields import ConfigError
from .measurement import Size

Program = Literal["sd-scripts", "musubi-tuner"]

_LEAST_RESOLUTION = 64
# musubi-tuner's multiple for nearly all its models; it has no option for it.
_MUSUBI_STEP = 16


@dataclass(frozen=True)
class Buckets:
    """How a data set chooses the sizes of its images.

    Attributes:
        resolution: width and height without buckets; the area of each bucket is at most theirs.
        enabled: whether the shape of an image decides on its bucket.
        no_upscale: whether no image is enlarged.
        limits: the smallest and the largest side of a bucket; musubi-tuner has none.
        step: sides are multiples of it.
        program: the one whose rules are meant.
    """

    resolution: Size
    enabled: bool = False
    no_upscale: bool = False
    limits: tuple[int, int] = (256, 1024)
    step: int = 64
    program: Program = "sd-scripts"

    def bucket(self, image: Size) -> Size:
        """(width, height) to which an image is cropped at last.

        Args:
            image: its width and height.
        """
        width, height = self.resized(image)
        if self.enabled and self.no_upscale and self._keeps_shape(image):
            return width // self.step * self.step, height // self.step * self.step
        return self._nearest(image)

    def resized(self, image: Size) -> Size:
        """(width, height) to which an image is resized before it is cropped.

        Args:
            image: its width and height.
        """
        if not (self.enabled and self.no_upscale and self._keeps_shape(image)):
            return covering(image, self._nearest(image))
        if self.program == "musubi-tuner":
            width, height = (side // self.step * self.step for side in image)
            return covering(image, (width, height))
        return image if self._is_small(image) else self._reduced(image)

    def _is_small(self, image: Size) -> bool:
        return image[0] * image[1] <= self.resolution[0] * self.resolution[1]

    def _keeps_shape(self, image: Size) -> bool:
        """Whether an image that is not to be enlarged has a bucket of its own."""
        return self.program == "sd-scripts" or self._is_small(image)

    def _reduced(self, image: Size) -> Size:
        """An image reduced to the area of the resolution, one side being a multiple of the step."""
        area, ratio = self.resolution[0] * self.resolution[1], image[0] / image[1]
        width = self._in_steps(math.sqrt(area * ratio))
        height = self._in_steps(math.sqrt(area / ratio))
        # Whichever leaves a bucket whose shape is nearer to the image's.
        by_width = abs(width / self._in_steps(width / ratio) - ratio)
        by_height = abs(self._in_steps(height * ratio) / height - ratio)
        if by_width < by_height:
            return width, _rounded(width / ratio)
        return _rounded(height * ratio), height

    def _in_steps(self, side: float) -> int:
        """At least one step: of an image so narrow that sd-scripts cannot make a bucket for it, too."""
        return max(self.step, _rounded(side) // self.step * self.step)

    def _nearest(self, image: Size) -> Size:
        """The bucket of the nearest shape."""
        if self.program == "sd-scripts" and image in self._all:
            return image
        ratio = image[0] / image[1]
        return min(self._all, key=lambda size: abs(size[0] / size[1] - ratio))

    @cached_property
    def _all(self) -> list[Size]:
        """The buckets that can be chosen from, sorted."""
        if not self.enabled:
            return [self.resolution]
        area, step = self.resolution[0] * self.resolution[1], self.step
        square = int(math.sqrt(area))
        if self.program == "musubi-tuner":
            sides = range(square // 2 // step * step, square + step, step)
            buckets = {(side, area // side // step * step) for side in sides}
        else:
            least, most = self.limits
            buckets = {(side, min(most, area // side // step * step)) for side in range(least, most + 1, step)}
            buckets = {size for size in buckets if size[1] >= least} | {2 * (square // step * step,)}
        return sorted(size for size in buckets | {size[::-1] for size in buckets} if min(size) > 0)


def covering(image: Size, bucket: Size) -> Size:
    """(width, height) of an image that is scaled until it covers a bucket.

    Args:
        image: its width and height.
        bucket: those of the bucket.
    """
    scale = max(side / own for side, own in zip(bucket, image, strict=True))
    width, height = (max(side, _rounded(own * scale)) for side, own in zip(bucket, image, strict=True))
    return width, height


def read_buckets(options: Mapping[str, Any], program: Program = "sd-scripts") -> Buckets | None:
    """The buckets that training options describe, by the names that both programs share; None without a resolution.

    Args:
        options: of a run, or of a data set.
        program: the one that reads them.

    Raises:
        ConfigError: an invalid value.
    """
    is_musubi = program == "musubi-tuner"
    resolution = options.get("resolution", (960, 544) if is_musubi else None)
    if resolution is None:
        return None
    step = _MUSUBI_STEP if is_musubi else _number(options, "bucket_reso_steps", 64)
    least, most = _number(options, "min_bucket_reso", 256), _number(options, "max_bucket_reso", 1024)
    return Buckets(
        _resolution(resolution),
        enabled=bool(options.get("enable_bucket")),
        no_upscale=bool(options.get("bucket_no_upscale")),
        limits=(max(least // step, 1) * step, -(-most // step) * step),
        step=step,
        program=program,
    )


def _resolution(given: Any) -> Size:
    parts = given if isinstance(given, (list, tuple)) else str(given).split(",")
    try:
        sides = [int(part) for part in parts]
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2) or min(sides) < _LEAST_RESOLUTION:
        raise ConfigError(
            f'resolution = {given!r}: expected a side like 1024, or "width,height", of at least {_LEAST_RESOLUTION}'
        )
    return sides[0], sides[-1]


def _number(options: Mapping[str, Any], key: str, default: int) -> int:
    given = options.get(key, default)
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise ConfigError(f"{key} = {given!r}: expected a whole number of at least 1, like {default}")
    return given


def _rounded(side: float) -> int:
    return int(side + 0.5)
