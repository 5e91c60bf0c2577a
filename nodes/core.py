"""What this pack assumes of ComfyUI: the names that must be there, and what only newer versions have."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

OLDEST = "0.3.64"

# "module:name"; the nodes beside `ALL_NODES` check theirs when they run.
ALL_NODES = (
    "comfy_api.latest:ComfyExtension",
    "comfy_api.latest:io.Schema",
    "comfy_api.latest:io.MultiType.Input",
    "comfy_api.latest:io.LatentOperation.Output",
    "comfy_api.latest:ui.PreviewImage",
    "comfy.latent_formats:LatentFormat.process_in",
    "comfy.model_management:throw_exception_if_processing_interrupted",
    "comfy.utils:ProgressBar",
    "folder_paths:get_filename_list",
    "folder_paths:get_full_path",
)
LORA = (
    "comfy.lora:model_lora_keys_unet",
    "comfy.lora:model_lora_keys_clip",
    "comfy.lora_convert:convert_lora",
    "comfy.sd:load_lora_for_models",
    "comfy.utils:get_attr",
    "comfy.utils:load_torch_file",
)
GATE = (
    *LORA,
    "comfy.lora:load_lora",
    "comfy.lora:calculate_weight",
    "comfy.patcher_extension:WrappersMP.CALC_COND_BATCH",
    "comfy.patcher_extension:WrappersMP.APPLY_MODEL",
    "comfy.patcher_extension:WrappersMP.DIFFUSION_MODEL",
    "comfy.patcher_extension:CallbacksMP.ON_CLEANUP",
    "comfy.model_patcher:ModelPatcher.add_wrapper_with_key",
    "comfy.model_patcher:ModelPatcher.add_callback_with_key",
)

# Where core's nodes put themselves between sampler and model, as kind and key of a wrapper. TorchCompileModel exchanges
# the model for a compiled one; EasyCache answers for the model.
COMPILE = ("APPLY_MODEL", "torch.compile")
CACHE = ("DIFFUSION_MODEL", "easycache")

# Keywords that newer versions brought, left out where the installed one does not know them. One unknown keyword makes
# ComfyUI drop the whole pack, so any other is a mistake of ours. lora_metadata: 0.22.
_NEWER = {"search_aliases", "advanced", "essentials_category", "lora_metadata"}


def version() -> str:
    """The installed ComfyUI's version."""
    try:
        return importlib.import_module("comfyui_version").__version__
    except (ImportError, AttributeError):
        return "of an unknown version"


def require(names: tuple[str, ...], user: str = "freq_loss_plugin") -> None:
    """Check that ComfyUI has everything in ``names``.

    Args:
        names: entries "module:name".
        user: what needs them, for the message.

    Raises:
        ImportError: something is missing; names it, and ComfyUI's version.
    """
    missing = [name for name in names if not _has(name)]
    if missing:
        raise ImportError(
            f"{user} does not work with this ComfyUI ({version()}), which lacks {', '.join(missing)}; expected "
            f"{OLDEST} or newer. Update ComfyUI, or, if it is newer than this pack, the pack"
        )


def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a function of ComfyUI without those keywords that only newer versions know."""
    known = inspect.signature(function).parameters
    return function(*arguments, **{name: value for name, value in named.items() if name in known or name not in _NEWER})


def is_wrapped(options: dict[str, Any], wrapper: tuple[str, str]) -> bool:
    """Whether one of core's nodes is between sampler and model.

    Args:
        options: the options that come with a model's call.
        wrapper: `COMPILE` or `CACHE`.
    """
    kind, key = wrapper
    kinds = importlib.import_module("comfy.patcher_extension").WrappersMP
    return key in options.get("transformer_options", {}).get("wrappers", {}).get(getattr(kinds, kind), {})


def keeps_lora_metadata() -> bool:
    """Whether a LoRA's metadata is kept with the model that it is applied to (0.22)."""
    return "lora_metadata" in inspect.signature(importlib.import_module("comfy.sd").load_lora_for_models).parameters


def is_int8(layer: Any) -> bool:
    """Whether ComfyUI keeps a layer's weight in INT8, and may compute it without calling the layer (0.33)."""
    return getattr(getattr(layer, "weight", None), "_layout_cls", None) == "TensorWiseINT8Layout"


def _has(name: str) -> bool:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return True


require(ALL_NODES)
