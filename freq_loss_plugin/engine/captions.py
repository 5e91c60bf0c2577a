"""The captions of training images, read as sd-scripts reads them; what it would not say is said here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..options.files import read_text

MANY_LINES = "captions of several lines: only the first counts"
EMPTY = "empty captions (sd-scripts stops at an empty file)"


class Caption(NamedTuple):
    """A caption, and what the user should know of its file."""

    text: str
    notes: tuple[str, ...] = ()


def read_caption(image: Path, ending: str) -> Caption | None:
    """The caption in the file beside an image; None where there is no such file.

    Args:
        image: the image.
        ending: of the caption file, like ``.txt``.

    Raises:
        ConfigError: it is not UTF-8.
    """
    file = image.with_suffix(ending)
    if not file.is_file():
        return None
    lines = [line.strip() for line in read_text(file).splitlines()]
    written = [line for line in lines if line]
    if not written:
        return Caption("", (EMPTY,))
    return Caption(written[0], (MANY_LINES,) if len(written) > 1 else ())


def too_long(captions: Iterable[str], tokenizer: Any) -> list[str]:
    """A warning where captions have more tokens than the text encoder sees."""
    most = tokenizer.model_max_length - 2  # without those of start and end
    unique = list(dict.fromkeys(captions))
    lengths = [len(ids) for ids in tokenizer(unique, add_special_tokens=False, verbose=False).input_ids]
    long = sum(length > most for length in lengths)
    if not long:
        return []
    return [f"{long} captions have more than {most} tokens, up to {max(lengths)}: what comes after them is not seen"]
