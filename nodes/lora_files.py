"""LoRA files in models/loras: their names, their headers, their weights, and whether they have changed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..freq_loss_plugin.lora_info import LoraFile, LoraFileError, read_lora
from .schema import widget

_FOLDER = "loras"
_ENDINGS = (".safetensors", ".sft")


class ReadsLora(io.ComfyNode):
    """A node whose result depends on a file."""

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None, **_: Any) -> str:
        """A file that was trained again under the same name is read again.

        Args:
            lora_name: the file; None where the name comes from another node, which ComfyUI has not run yet: then any
                changed file counts.
        """
        return (
            _state(lora_name) if lora_name else hashlib.sha256("".join(map(_state, lora_files())).encode()).hexdigest()
        )


def lora_files() -> list[str]:
    """The names of all .safetensors files in models/loras."""
    return [name for name in folder_paths.get_filename_list(_FOLDER) if name.lower().endswith(_ENDINGS)]


def file_input() -> io.Input:
    """The list of LoRA files."""
    return widget(io.Combo, "lora_name", options=lora_files(), tooltip="A .safetensors file in models/loras.")


def header_of(lora_name: str) -> LoraFile:
    """What the file of this name says of itself.

    Raises:
        LoraFileError: see `freq_loss_plugin.lora_info.read_lora`.
    """
    return read_lora(_path(lora_name))


def load(lora_name: str) -> tuple[LoraFile, dict[str, Tensor]]:
    """The header and the weights of a file.

    Raises:
        LoraFileError: see `freq_loss_plugin.lora_info.read_lora`; or a weight is NaN or infinite.
    """
    path = _path(lora_name)
    lora = read_lora(path)
    weights = comfy.utils.load_torch_file(path, safe_load=True)
    broken = [key for key, weight in weights.items() if weight.is_floating_point() and not _finite(weight)]
    if broken:
        raise LoraFileError(
            f"{lora_name}: {len(broken)} of {len(weights)} tensors hold NaN or infinite values (the first is "
            f"{broken[0]}); its training diverged, use an earlier save of it"
        )
    return lora, weights


def _path(lora_name: str) -> str:
    path = folder_paths.get_full_path(_FOLDER, lora_name)
    if path is None or not lora_name.lower().endswith(_ENDINGS):
        raise LoraFileError(
            f"{lora_name} is not in models/loras, or no .safetensors file; copy it there and refresh (R)"
        )
    return path


def _state(lora_name: str) -> str:
    path = folder_paths.get_full_path(_FOLDER, lora_name)
    if path is None:
        return "missing"
    state = Path(path).stat()
    return f"{state.st_mtime_ns}:{state.st_size}"


def _finite(weight: Tensor) -> bool:
    return bool(torch.isfinite(weight.float()).all())
