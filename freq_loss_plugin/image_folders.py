"""The images of a kohya run: those in its folders ``10_mycat``, or in the subsets of its dataset config."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from .options.fields import ConfigError
from .options.files import load_toml, read_text
from .options.parsing import flatten

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
# Images that sd-scripts does not see.
_OTHER_ENDINGS = (".gif", ".heic", ".heif", ".jfif", ".jp2", ".psd", ".svg", ".tif", ".tiff")
# The options of sd-scripts that name the images.
SOURCES = ("train_data_dir", "reg_data_dir", "dataset_config", "in_json")


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
    """The arguments of `find_images` out of a flat configuration."""
    return {source: config.get(source) for source in SOURCES}


def find_images(
    train_data_dir: str | None = None,
    reg_data_dir: str | None = None,
    dataset_config: str | None = None,
    in_json: str | None = None,
) -> list[Path]:
    """All images of a run, including regularization images, without duplicates.

    Args:
        train_data_dir: a folder of folders named repeats_name; with ``in_json`` the folder of its images.
        reg_data_dir: the same for regularization images.
        dataset_config: a TOML or JSON file with ``[[datasets]]`` and ``[[datasets.subsets]]``.
        in_json: a metadata file of sd-scripts' fine-tuning method.

    Raises:
        ConfigError: none of the four is given, one does not exist, or there are no images.
    """
    if dataset_config:
        images = _from_config(Path(dataset_config))
    elif in_json:
        images = _from_metadata(Path(in_json), train_data_dir)
    else:
        folders = {"train_data_dir": train_data_dir, "reg_data_dir": reg_data_dir}
        images = [image for key, folder in folders.items() if folder for image in _from_folders(key, Path(folder))]
    unique = list(dict.fromkeys(image.absolute() for image in images))
    if not unique:
        given = ", ".join(
            f"{key} = {value!r}"
            for key, value in zip(SOURCES, (train_data_dir, reg_data_dir, dataset_config, in_json), strict=True)
            if value
        )
        raise ConfigError(
            f"no images: {given or 'none of ' + ', '.join(SOURCES) + ' is given'}. Expected folders named like "
            f"10_mycat with {', '.join(ENDINGS)} files in them, or a dataset config that names folders"
        )
    return unique


def of_folder(folder: Path) -> list[Path]:
    """The images directly in a folder, sorted by name; hidden files, like those of macOS, are none."""
    return _with_ending(folder, ENDINGS)


def left_out(folder: Path) -> list[Path]:
    """Images directly in a folder whose formats sd-scripts does not read."""
    return _with_ending(folder, _OTHER_ENDINGS)


def repeated(root: Path) -> dict[Path, tuple[int, str]]:
    """The folders of a ``train_data_dir`` with their repeats and names: ``10_mycat`` has 10 and mycat."""
    folders = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        match = re.fullmatch(r"(\d+)(?:_(.*))?", folder.name)
        if match and int(match.group(1)) > 0:
            folders[folder] = int(match.group(1)), match.group(2) or ""
    return folders


def _with_ending(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    return sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in endings)


def _from_folders(key: str, root: Path) -> list[Path]:
    if not root.is_dir():
        raise ConfigError(f"{key} = {str(root)!r}: there is no such folder")
    return [image for folder in repeated(root) for image in of_folder(folder)]


def _from_config(file: Path) -> list[Path]:
    images: list[Path] = []
    for dataset in _read_config(file).get("datasets", []):
        for subset in dataset.get("subsets", []):
            folder, metadata = subset.get("image_dir"), subset.get("metadata_file")
            if metadata:
                images += _from_metadata(Path(metadata), folder)
            elif folder and not Path(folder).is_dir():
                raise ConfigError(f"dataset_config = {str(file)!r}: image_dir = {folder!r}: there is no such folder")
            elif folder:
                images += of_folder(Path(folder))
    return images


def _read_config(file: Path) -> Mapping[str, Any]:
    try:
        if file.suffix.lower() != ".json":
            return load_toml(file, "dataset_config")
        return json.loads(read_text(file))
    except (OSError, JSONDecodeError) as error:
        raise ConfigError(f"dataset_config = {str(file)!r} cannot be read: {error}") from None


def _from_metadata(file: Path, folder: str | None) -> list[Path]:
    """The keys of a metadata file: paths of images, or their names in ``folder`` without extension."""
    try:
        lines = read_text(file)
        keys = (
            [json.loads(line)["image_path"] for line in lines.splitlines() if line.strip()]
            if file.suffix == ".jsonl"
            else list(json.loads(lines))
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the metadata file {str(file)!r} cannot be read: {error!r}") from None
    by_stem = {path.stem: path for path in of_folder(Path(folder))} if folder and Path(folder).is_dir() else {}
    images = []
    for key in keys:
        path = Path(key) if Path(key).suffix.lower() in ENDINGS else by_stem.get(Path(key).name)
        if path is None or not path.is_file():
            raise ConfigError(f"the metadata file {str(file)!r} names {key!r}, but there is no such image")
        images.append(path)
    return images
