"""What this pack assumes of ComfyUI: the names that must be there, and what only newer versions have."""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Callable
from typing import Any

OLDEST = "0.3.64"

# Entries "module:name". Those of all nodes are checked at import, the others when a node that needs them runs.
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
    "comfy.lora:load_lora",
    "comfy.lora:model_lora_keys_unet",
    "comfy.lora:model_lora_keys_clip",
    "comfy.lora_convert:convert_lora",
    "comfy.sd:load_lora_for_models",
    "comfy.utils:get_attr",
    "comfy.utils:load_torch_file",
)
GATE = (
    *LORA,
    "comfy.lora:calculate_weight",
    "comfy.patcher_extension:WrappersMP.CALC_COND_BATCH",
    "comfy.patcher_extension:WrappersMP.APPLY_MODEL",
    "comfy.patcher_extension:WrappersMP.DIFFUSION_MODEL",
    "comfy.patcher_extension:CallbacksMP.ON_CLEANUP",
    "comfy.model_patcher:ModelPatcher.add_wrapper_with_key",
    "comfy.model_patcher:ModelPatcher.add_callback_with_key",
)

# Wrappers, as (type, key), that core's nodes put between sampler and model. TorchCompileModel replaces the model by a
# compiled one; EasyCache reuses earlier predictions in place of a model call.
TORCH_COMPILE = ("APPLY_MODEL", "torch.compile")
EASY_CACHE = ("DIFFUSION_MODEL", "easycache")

# Keywords of newer versions, dropped where the installed one does not know them. A single unknown keyword keeps ComfyUI
# from loading the pack, so any other is a mistake of ours. lora_metadata: 0.22.
_NEWER_KEYWORDS = {"search_aliases", "advanced", "essentials_category", "lora_metadata"}


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
        user: the node or pack that needs them, for the message.

    Raises:
        ImportError: something is missing; the message names it, and ComfyUI's version.
    """
    missing = [name for name in names if not _has(name)]
    if missing:
        raise ImportError(
            f"{user} does not work with this ComfyUI ({version()}), which lacks {', '.join(missing)}; expected "
            f"{OLDEST} or newer. Update ComfyUI, or, if it is newer than this pack, the pack"
        )


def call_supported(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of ComfyUI without those keywords that only newer versions support."""
    supported = inspect.signature(function).parameters
    dropped = _NEWER_KEYWORDS - supported.keys()
    return function(*args, **{name: value for name, value in kwargs.items() if name not in dropped})


def has_wrapper(model_options: dict[str, Any], wrapper: tuple[str, str]) -> bool:
    """Whether one of core's nodes has put a wrapper between sampler and model.

    Args:
        model_options: the options that a model is called with.
        wrapper: `TORCH_COMPILE` or `EASY_CACHE`.
    """
    name, key = wrapper
    wrapper_type = getattr(importlib.import_module("comfy.patcher_extension").WrappersMP, name)
    return key in model_options.get("transformer_options", {}).get("wrappers", {}).get(wrapper_type, {})


def keeps_lora_metadata() -> bool:
    """Whether a LoRA's metadata is kept with the model that it is applied to (0.22)."""
    return "lora_metadata" in inspect.signature(importlib.import_module("comfy.sd").load_lora_for_models).parameters


def is_int8(layer: Any) -> bool:
    """Whether a layer's weight is in INT8, where ComfyUI may compute its output without calling it (0.33)."""
    return getattr(getattr(layer, "weight", None), "_layout_cls", None) == "TensorWiseINT8Layout"


def _has(name: str) -> bool:
    module, _, path = name.partition(":")
    try:
        operator.attrgetter(path)(importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    return True


require(ALL_NODES)
