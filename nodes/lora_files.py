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

from ..freq_loss_plugin.lora.metadata import LoraFile, LoraFileError, read_lora
from .schema import widget

_FOLDER = "loras"
_EXTENSIONS = (".safetensors", ".sft")
# What a node says whose strengths are 0: it is switched off, whatever the file.
SWITCHED_OFF = "not applied: the strengths are 0"


class LoraFileNode(io.ComfyNode):
    """A node whose result depends on a LoRA file."""

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None, **_: Any) -> str:
        """A fingerprint by which ComfyUI notices that a file has been replaced under the same name.

        Args:
            lora_name: the file; None where the name comes from another node, which ComfyUI has not run yet: then the
                fingerprint covers all files.
        """
        if lora_name:
            return _version_stamp(lora_name)
        return hashlib.sha256("".join(map(_version_stamp, lora_names())).encode()).hexdigest()


def lora_names() -> list[str]:
    """The names of all .safetensors files in models/loras."""
    return [name for name in folder_paths.get_filename_list(_FOLDER) if name.lower().endswith(_EXTENSIONS)]


def lora_input() -> io.Input:
    """The list of LoRA files."""
    return widget(io.Combo, "lora_name", options=lora_names(), tooltip="A .safetensors file in models/loras.")


def read_header(lora_name: str) -> LoraFile:
    """The header of a file.

    Raises:
        LoraFileError: see `freq_loss_plugin.lora.metadata.read_lora`.
    """
    return read_lora(_path(lora_name))


def load_lora(lora_name: str) -> tuple[LoraFile, dict[str, Tensor]]:
    """The header and the weights of a file.

    Raises:
        LoraFileError: see `freq_loss_plugin.lora.metadata.read_lora`; or a weight is NaN or infinite.
    """
    path = _path(lora_name)
    lora = read_lora(path)
    weights = comfy.utils.load_torch_file(path, safe_load=True)
    broken = [key for key, weight in weights.items() if weight.is_floating_point() and not _is_finite(weight)]
    if broken:
        raise LoraFileError(
            f"{lora_name}: {len(broken)} of {len(weights)} tensors hold NaN or infinite values (the first is "
            f"{broken[0]}); its training diverged, use an earlier checkpoint"
        )
    return lora, weights


def _path(lora_name: str) -> str:
    path = folder_paths.get_full_path(_FOLDER, lora_name)
    if path is None or not lora_name.lower().endswith(_EXTENSIONS):
        raise LoraFileError(
            f"{lora_name} is not in models/loras, or is not a .safetensors file; copy it there and refresh (R)"
        )
    return path


def _version_stamp(lora_name: str) -> str:
    """Time of the last change and size."""
    path = folder_paths.get_full_path(_FOLDER, lora_name)
    if path is None:
        return "missing"
    status = Path(path).stat()
    return f"{status.st_mtime_ns}:{status.st_size}"


def _is_finite(weight: Tensor) -> bool:
    # float8 has no isfinite of its own.
    return bool(torch.isfinite(weight.float()).all())
