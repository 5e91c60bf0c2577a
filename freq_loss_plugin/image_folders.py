"""The images of a run: those in kohya's folders ``10_mycat``, or those that a dataset config names."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeAlias

from .options.fields import ConfigError
from .options.files import load_toml, read_text
from .options.parsing import flatten

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
# Images that no trainer sees.
_OTHER_ENDINGS = (".gif", ".heic", ".heif", ".jfif", ".jp2", ".psd", ".svg", ".tif", ".tiff")
# The videos of musubi-tuner.
_VIDEO_ENDINGS = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg")
# The options of sd-scripts that name the images.
SOURCES = ("train_data_dir", "reg_data_dir", "dataset_config", "in_json")
# What names the images of a data set of musubi-tuner.
_MUSUBI_SOURCES = ("image_directory", "image_jsonl_file", "video_directory", "video_jsonl_file")

# Why something is no image of a run; a warning begins with the number of its files.
OTHER_FORMAT = "images, left out, since trainers do not read their format; save them as PNG"
OUTSIDE = "images, not trained, since they are in no folder like 10_mycat"
NO_REPEATS = "folders, ignored, since their names do not begin with a number of repeats, like 10_mycat"
UNCAPTIONED = "images, left out by musubi-tuner, since they have no caption file"
VIDEO = "videos, not looked at; a run with freq_loss_image_quality measures a frame of each clip"
# A path, and why it is no image of the run; None where it is one.
_Entry: TypeAlias = tuple[str | None, Path]
_MAX_LISTED = 10


@dataclass(frozen=True)
class Found:
    """The images of a run, and what lies beside them.

    Attributes:
        images: absolute paths, without duplicates.
        warnings: what the user should know of files and folders that are not trained, one sentence for each reason.
        datasets: for each image the options of its data sets, where a dataset config has them.
    """

    images: list[Path]
    warnings: list[str]
    datasets: Mapping[Path, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the images of a run: `SOURCES`, and a kohya TOML that has them."""
    for source in SOURCES:
        parser.add_argument(f"--{source}", metavar="PATH", help="as in sd-scripts")
    parser.add_argument("--config_file", type=Path, metavar="TOML", help="a kohya TOML that names the images")


def read_config(options: argparse.Namespace) -> dict[str, Any]:
    """What the kohya TOML of `add_arguments` says, flat; the sources on the command line take precedence.

    Raises:
        ConfigError: the file cannot be read.
    """
    given = {source: getattr(options, source) for source in SOURCES if getattr(options, source)}
    if options.config_file is None:
        return given
    return flatten(load_toml(options.config_file, "--config_file")) | given


def sources(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `find` out of a flat configuration."""
    return {source: config.get(source) for source in SOURCES}


def find_images(**sources: Any) -> list[Path]:
    """The images that `find` finds for the same arguments."""
    return find(**sources).images


def find(
    train_data_dir: str | None = None,
    reg_data_dir: str | None = None,
    dataset_config: str | None = None,
    in_json: str | None = None,
    *,
    or_directly: bool = False,
) -> Found:
    """All images of a run, including regularization images.

    Args:
        train_data_dir: a folder of folders named repeats_name; with ``in_json`` the folder of its images.
        reg_data_dir: the same for regularization images.
        dataset_config: a TOML or JSON file of sd-scripts or musubi-tuner with ``[[datasets]]``.
        in_json: a metadata file of sd-scripts' fine-tuning method.
        or_directly: where no such folder has an image, take the images directly in ``train_data_dir``.

    Raises:
        ConfigError: none of the four is given, one does not exist, or there are no images.
    """
    datasets: dict[Path, list[Mapping[str, Any]]] = {}
    if dataset_config:
        entries = []
        for options, named in _from_config(Path(dataset_config)):
            entries += named
            for path in (path for why, path in named if why is None):
                datasets.setdefault(path.absolute(), []).append(options)
    elif in_json:
        entries = [(None, image) for image in _from_metadata(Path(in_json), train_data_dir)]
    else:
        folders = {"train_data_dir": train_data_dir, "reg_data_dir": reg_data_dir}
        given = {key: Path(folder) for key, folder in folders.items() if folder}
        entries = [entry for key, folder in given.items() for entry in _from_folders(key, folder, or_directly)]
    images = list(dict.fromkeys(path.absolute() for why, path in entries if why is None))
    warnings = in_words((why, path) for why, path in entries if why is not None)
    if not images:
        arguments = zip(SOURCES, (train_data_dir, reg_data_dir, dataset_config, in_json), strict=True)
        given_text = ", ".join(f"{key} = {value!r}" for key, value in arguments if value)
        where = {"folders": "the folders that it names"} if dataset_config else {}
        raise no_images(given_text or f"none of {', '.join(SOURCES)} is given", warnings, **where)
    return Found(images, warnings, datasets)


def no_images(given: str, warnings: Sequence[str], folders: str = "folders named like 10_mycat") -> ConfigError:
    """The error where there is none.

    Args:
        given: what names them.
        warnings: what was found instead.
        folders: where they should be.
    """
    instead = f"; found only {'; '.join(warnings)}" if warnings else ""
    return ConfigError(f"no images: {given}. Expected {', '.join(ENDINGS)} files in {folders}{instead}")


def of_folder(folder: Path) -> list[Path]:
    """The images directly in a folder, sorted by name; hidden files, like those of macOS, are none."""
    return _with_ending(folder, ENDINGS)


def repeated(root: Path) -> dict[Path, tuple[int, str]]:
    """The folders of a ``train_data_dir`` with their repeats and names: ``10_mycat`` has 10 and mycat."""
    folders = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        match = re.fullmatch(r"(\d+)(?:_(.*))?", folder.name)
        if match and int(match.group(1)) > 0:
            folders[folder] = int(match.group(1)), match.group(2) or ""
    return folders


def not_trained(root: Path) -> Iterator[tuple[str, Path]]:
    """What lies in a ``train_data_dir`` and is not trained, each with the reason."""
    folders = repeated(root)
    for path in sorted(root.glob("[!.]*")):
        if path.is_dir() and path not in folders and path.suffix.lower() not in ENDINGS:
            yield NO_REPEATS, path
    for image in of_folder(root):
        yield OUTSIDE, image
    for folder in (root, *folders):
        for image in _with_ending(folder, _OTHER_ENDINGS):
            yield OTHER_FORMAT, image


def in_words(entries: Iterable[tuple[str, Path]]) -> list[str]:
    """``3 images, left out, since ...: 10_mycat/a.tif``: a sentence for each reason.

    Args:
        entries: reasons, and what they are about.
    """
    by_reason: dict[str, dict[Path, None]] = {}
    for why, path in entries:
        by_reason.setdefault(why, {})[path.absolute()] = None
    return [f"{len(paths)} {why}: {listed(list(paths))}" for why, paths in by_reason.items()]


def listed(paths: Sequence[Path]) -> str:
    """The first few paths, each with the folder that it is in, and how many more there are."""
    names = [f"{path.parent.name}/{path.name}" for path in paths[:_MAX_LISTED]]
    return ", ".join(names) + (f" and {len(paths) - _MAX_LISTED} more" if len(paths) > _MAX_LISTED else "")


def _with_ending(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    return sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in endings)


def _from_folders(key: str, root: Path, or_directly: bool) -> Iterator[_Entry]:
    if not root.is_dir():
        raise _no_folder(key, root)
    images = [image for folder in repeated(root) for image in of_folder(folder)]
    if not images and or_directly:
        images = of_folder(root)
    yield from ((None, image) for image in images)
    taken = set(images)
    yield from ((why, path) for why, path in not_trained(root) if path not in taken)


def _no_folder(key: str, folder: Path | str) -> ConfigError:
    return ConfigError(f"{key} = {str(folder)!r}: there is no such folder")


def is_musubi(dataset: Mapping[str, Any]) -> bool:
    """Whether a data set is one of musubi-tuner, by its options."""
    return any(dataset.get(source) for source in _MUSUBI_SOURCES)


def _from_config(file: Path) -> Iterator[tuple[Mapping[str, Any], list[_Entry]]]:
    """The options of each data set, and what it names."""
    config = _read_config(file)
    if not isinstance(config, Mapping) or not isinstance(config.get("general", {}), Mapping):
        raise ConfigError(f"dataset_config = {str(file)!r}: expected [general] and [[datasets]]")
    for number, dataset in enumerate(_tables(file, config, "datasets"), 1):
        if not dataset.get("subsets") and not is_musubi(dataset):
            raise ConfigError(
                f"dataset_config = {str(file)!r}: number {number} of its [[datasets]] names no images. Expected "
                f"[[datasets.subsets]] with image_dir (sd-scripts), or {', '.join(_MUSUBI_SOURCES)} (musubi-tuner)"
            )
        options, key = {**config.get("general", {}), **dataset}, f"dataset_config = {str(file)!r}: "
        tables = _tables(file, dataset, "subsets", "datasets.")
        subsets = [entry for each in tables for entry in _from_subset(f"{key}image_dir", each)]
        yield options, [*subsets, *_from_musubi(key, options)]


def _tables(file: Path, config: Mapping[str, Any], name: str, prefix: str = "") -> list[Mapping[str, Any]]:
    """An array of tables; empty where there is none."""
    tables = config.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(each, Mapping) for each in tables):
        raise ConfigError(f"dataset_config = {str(file)!r}: expected [[{prefix}{name}]], with double brackets")
    return tables


def _from_subset(key: str, subset: Mapping[str, Any]) -> Iterator[_Entry]:
    """What a subset of sd-scripts names."""
    folder, metadata = subset.get("image_dir"), subset.get("metadata_file")
    if metadata:
        yield from ((None, image) for image in _from_metadata(Path(metadata), folder))
    elif folder:
        yield from _directly_in(key, Path(folder))


def _from_musubi(key: str, dataset: Mapping[str, Any]) -> Iterator[_Entry]:
    """What a data set of musubi-tuner names, which is one of images or one of videos."""
    images, listed_images, videos, listed_videos = (dataset.get(source) for source in _MUSUBI_SOURCES)
    if images:
        ending = dataset.get("caption_extension") if not dataset.get("multiple_target") else None
        for why, image in _directly_in(f"{key}image_directory", Path(images)):
            has_caption = not ending or (image.parent / f"{image.stem}.{ending.lstrip('.')}").is_file()
            yield why or (None if has_caption else UNCAPTIONED), image
    elif listed_images:
        yield from ((None, image) for image in _from_metadata(Path(listed_images), None))
    elif videos:
        if not Path(videos).is_dir():
            raise _no_folder(f"{key}video_directory", videos)
        yield from ((VIDEO, video) for video in _with_ending(Path(videos), _VIDEO_ENDINGS))
    elif listed_videos:
        yield from ((VIDEO, Path(video)) for video in _keys(Path(listed_videos), "video_path"))


def _directly_in(key: str, folder: Path) -> Iterator[_Entry]:
    if not folder.is_dir():
        raise _no_folder(key, folder)
    yield from ((None, image) for image in of_folder(folder))
    yield from ((OTHER_FORMAT, image) for image in _with_ending(folder, _OTHER_ENDINGS))


def _read_config(file: Path) -> Mapping[str, Any]:
    try:
        if file.suffix.lower() != ".json":
            return load_toml(file, "dataset_config")
        return json.loads(read_text(file))
    except (OSError, JSONDecodeError) as error:
        raise ConfigError(f"dataset_config = {str(file)!r} cannot be read: {error}") from None


def _from_metadata(file: Path, folder: str | None) -> list[Path]:
    """The images of a metadata file: their paths, or their names in ``folder`` without extension."""
    by_stem = {path.stem: path for path in of_folder(Path(folder))} if folder and Path(folder).is_dir() else {}
    images = []
    for key in _keys(file, "image_path"):
        path = Path(key) if Path(key).is_file() else by_stem.get(Path(key).name)
        if path is None:
            raise ConfigError(f"the metadata file {str(file)!r} names {key!r}, but there is no such image")
        images.append(path)
    return images


def _keys(file: Path, name: str) -> list[str]:
    """The keys of a metadata file of sd-scripts, or what ``name`` or ``name_0`` and so on are in each line of JSON."""
    try:
        text = read_text(file)
        if file.suffix != ".jsonl":
            return list(json.loads(text))
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        found = [[line[key] for key in line if re.fullmatch(rf"{name}(_\d+)?", key)] for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the metadata file {str(file)!r} cannot be read: {error!r}") from None
    if not all(found):
        raise ConfigError(f"the metadata file {str(file)!r} has a line without {name}")
    return [key for keys in found for key in keys]
