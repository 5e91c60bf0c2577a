"""Which pictures a kohya training uses: its folders ``10_mycat``, or the subsets of its dataset config."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .options import ConfigError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
# What names the pictures of a training, in its TOML or on its command line.
SOURCES = ("train_data_dir", "reg_data_dir", "dataset_config", "in_json")


def pictures(
    train_data_dir: str | None = None,
    reg_data_dir: str | None = None,
    dataset_config: str | None = None,
    in_json: str | None = None,
) -> list[Path]:
    """All pictures of a training, regularisation pictures among them, each once.

    Args:
        train_data_dir: a folder of folders named repeats_name; with ``in_json`` the folder of its pictures.
        reg_data_dir: the same for regularisation pictures.
        dataset_config: a TOML or JSON file with ``[[datasets]]`` and ``[[datasets.subsets]]``.
        in_json: a metadata file of sd-scripts' fine-tuning method.

    Raises:
        ConfigError: none of the four is given, one of them is not there, or there is no picture.
    """
    if dataset_config:
        found = _of_config(Path(dataset_config))
    elif in_json:
        found = _of_metadata(Path(in_json), train_data_dir)
    else:
        folders = {"train_data_dir": train_data_dir, "reg_data_dir": reg_data_dir}
        found = [picture for key, folder in folders.items() if folder for picture in _of_folders(key, Path(folder))]
    unique = list(dict.fromkeys(picture.absolute() for picture in found))
    if not unique:
        given = ", ".join(
            f"{key} = {value!r}"
            for key, value in zip(SOURCES, (train_data_dir, reg_data_dir, dataset_config, in_json), strict=True)
            if value
        )
        raise ConfigError(
            f"no pictures: {given or 'none of ' + ', '.join(SOURCES) + ' is given'}. Expected folders named like "
            f"10_mycat with {', '.join(ENDINGS)} files in them, or a dataset config that names folders"
        )
    return unique


def of_folder(folder: Path) -> list[Path]:
    """The pictures that lie in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)


def repeated(root: Path) -> dict[Path, tuple[int, str]]:
    """The folders of a ``train_data_dir`` that are trained: each one's repeats and name, ``10_mycat`` -> 10, mycat."""
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        match = re.fullmatch(r"(\d+)(?:_(.*))?", folder.name)
        if match and int(match.group(1)) > 0:
            found[folder] = int(match.group(1)), match.group(2) or ""
    return found


def _of_folders(key: str, root: Path) -> list[Path]:
    if not root.is_dir():
        raise ConfigError(f"{key} = {str(root)!r}: there is no such folder")
    return [picture for folder in repeated(root) for picture in of_folder(folder)]


def _of_config(file: Path) -> list[Path]:
    found: list[Path] = []
    for dataset in _read_config(file).get("datasets", []):
        for subset in dataset.get("subsets", []):
            folder, metadata = subset.get("image_dir"), subset.get("metadata_file")
            if metadata:
                found += _of_metadata(Path(metadata), folder)
            elif folder and not Path(folder).is_dir():
                raise ConfigError(f"dataset_config = {str(file)!r}: image_dir = {folder!r}: there is no such folder")
            elif folder:
                found += of_folder(Path(folder))
    return found


def _read_config(file: Path) -> Mapping[str, Any]:
    import toml

    try:
        text = file.read_text(encoding="utf-8")
        return json.loads(text) if file.suffix.lower() == ".json" else toml.loads(text)
    except (OSError, ValueError) as error:  # toml's and json's own errors are ValueErrors
        raise ConfigError(f"dataset_config = {str(file)!r} cannot be read: {error}") from None


def _of_metadata(file: Path, folder: str | None) -> list[Path]:
    """The keys of a metadata file: paths of pictures, or their names in ``folder`` without ending."""
    try:
        lines = file.read_text(encoding="utf-8")
        keys = (
            [json.loads(line)["image_path"] for line in lines.splitlines() if line.strip()]
            if file.suffix == ".jsonl"
            else list(json.loads(lines))
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"the metadata file {str(file)!r} cannot be read: {error!r}") from None
    by_stem = {path.stem: path for path in of_folder(Path(folder))} if folder and Path(folder).is_dir() else {}
    found = []
    for key in keys:
        path = Path(key) if Path(key).suffix.lower() in ENDINGS else by_stem.get(Path(key).name)
        if path is None or not path.is_file():
            raise ConfigError(f"the metadata file {str(file)!r} names {key!r}, and there is no such picture")
        found.append(path)
    return found
