"""Which tensors of a LoRA file ComfyUI applies to a model, by ComfyUI's own reading of the file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import comfy.lora
import comfy.lora_convert
import comfy.utils
from torch import Tensor

from ..freq_loss_plugin.lora.metadata import LoraFile, module_of
from ..freq_loss_plugin.lora.side_branch import weight_shape

# What tensors are that ComfyUI leaves out, by a part of their names.
_KNOWN_TENSORS = {
    "lora_magnitude_vector": "DoRA in PEFT's format, so the effect is not the trained one",
    "bundle_emb": "embeddings; to use them in prompts, save them in models/embeddings",
}


class ModuleMatch(NamedTuple):
    """The names of a LoRA's modules, by how they match the layers of a model."""

    matched: tuple[str, ...]
    unknown: tuple[str, ...]
    """No layer of the model has this name, or ComfyUI does not support this kind of adapter."""
    wrong_size: tuple[str, ...]
    """The layer of this name has another size."""
    text_encoder: frozenset[str]
    """Those that belong to a text encoder, of all three."""
    unused: tuple[str, ...]
    """Tensors that ComfyUI does not apply, except those of unknown modules and of modules of the wrong size."""
    weights: dict[str, Tensor]
    """All tensors but those of modules of the wrong size, under the names that ComfyUI gives them."""


class _RecordedReads(dict[str, Tensor]):
    """Tensors by name, and the names of those that were read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 - it is __getitem__ that records


def match_modules(weights: dict[str, Tensor], model: Any, clip: Any) -> ModuleMatch:
    """Compare a LoRA, after core's own renaming, with the layers of a model.

    Args:
        weights: its tensors.
        model: ComfyUI's model patcher, or None where it is not to be adapted.
        clip: ComfyUI's text encoder, or None where it is not to be adapted.
    """
    targets: dict[str, tuple[Any, Any]] = {}
    if model is not None:
        targets |= {key: (model.model, at) for key, at in comfy.lora.model_lora_keys_unet(model.model, {}).items()}
    if clip is not None:
        encoder = clip.cond_stage_model
        targets |= {key: (encoder, at) for key, at in comfy.lora.model_lora_keys_clip(encoder, {}).items()}
    tensors = _RecordedReads(comfy.lora_convert.convert_lora(weights))
    owners = dict.fromkeys(owner for owner, _ in targets.values())
    patched = read_patches(tensors, {name: target for name, (_, target) in targets.items()}, owners).keys()
    file = LoraFile("", {}, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    matched, unknown, wrong_size = [], [], []
    for name in file.modules:
        if name not in targets or patched.isdisjoint((targets[name][1], _bias_of(targets[name][1]))):
            unknown.append(name)
        elif _has_layer_size(name, file.shapes, *targets[name]):
            matched.append(name)
        else:
            wrong_size.append(name)
    ignored = tensors.keys() - tensors.names
    for name in matched:
        if _bias_of(targets[name][1]) not in patched:
            ignored |= {f"{name}.diff_b", f"{name}.b_norm"} & tensors.keys()
    left_out = {*unknown, *wrong_size}
    unused = tuple(sorted(key for key in ignored if _owner(key, left_out) is None))
    misfits = {*wrong_size}
    kept = {key: tensor for key, tensor in tensors.items() if _owner(key, misfits) is None}
    modules = (tuple(matched), tuple(unknown), tuple(wrong_size))
    return ModuleMatch(*modules, frozenset(file.text_encoder_modules), unused, kept)


def read_patches(tensors: dict[str, Tensor], targets: dict[str, Any], owners: Iterable[Any]) -> dict[Any, Any]:
    """Core's patches by their targets, without those of parameters that do not exist, which core ignores.

    Args:
        tensors: of a LoRA file, under the names that core gives them.
        targets: module name to target: the key of a weight, or a tuple of it, the rows that are adapted, and maybe a
            function of the change.
        owners: the modules that have the parameters.
    """
    patches = comfy.lora.load_lora(tensors, targets, log_missing=False)
    parameters = {key for owner in owners for key in owner.state_dict()}
    return {at: patch for at, patch in patches.items() if (at if isinstance(at, str) else at[0]) in parameters}


def describe_unused(match: ModuleMatch) -> str:
    """How many tensors are not used, and what they are."""
    kinds: Counter[str] = Counter()
    modules = {*match.matched}
    for key in match.unused:
        known = next((part for part in _KNOWN_TENSORS if part in key), None)
        owner = _owner(key, modules)
        kinds[known or (key[len(owner) + 1 :] if owner else key)] += 1
    parts = [
        f"{count} {kind}{f' ({_KNOWN_TENSORS[kind]})' if kind in _KNOWN_TENSORS else ''}"
        for kind, count in kinds.most_common(4)
    ]
    rest = ["…"] if len(kinds) > len(parts) else []
    number = len(match.unused)
    return (
        f"{number} tensor{'s' if number > 1 else ''} of the file {'are' if number > 1 else 'is'} not used, since "
        f"ComfyUI does not know {'them' if number > 1 else 'it'}: {'; '.join([*parts, *rest])}"
    )


def _bias_of(target: Any) -> str | None:
    """The key of the bias beside a weight."""
    return f"{target.removesuffix('.weight')}.bias" if isinstance(target, str) else None


def _owner(key: str, modules: set[str]) -> str | None:
    """The one of these modules that a tensor belongs to; its ending may be one that we do not know."""
    name = module_of(key) or key
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name if name in modules else None


def _has_layer_size(name: str, shapes: Any, model: Any, target: Any) -> bool:
    """Whether up·down has as many values as the layer's weight; True, as in core, where that cannot be determined.

    Args:
        name: of the module.
        shapes: of the file's tensors.
        model: that has the layer.
        target: the key of the weight, or that key with (dimension, start, length) of the part that is adapted.
    """
    up = _first_shape(shapes, (f"{name}.lora_up.weight", f"{name}.lora_B.weight", f"{name}.lora.up.weight"))
    down = _first_shape(shapes, (f"{name}.lora_down.weight", f"{name}.lora_A.weight", f"{name}.lora.down.weight"))
    changes_size = f"{name}.lora_mid.weight" in shapes or f"{name}.reshape_weight" in shapes
    key, part = (target, None) if isinstance(target, str) else target[:2]
    path, _, parameter = key.rpartition(".")
    if up is None or down is None or changes_size or parameter != "weight":
        return True
    try:
        shape = weight_shape(comfy.utils.get_attr(model, path))
    except AttributeError:
        return True
    if shape is not None and part is not None:
        shape = (*shape[: part[0]], part[2], *shape[part[0] + 1 :])
    return shape is None or up[0] * math.prod(down[1:]) == math.prod(shape)


def _first_shape(shapes: Any, names: Iterable[str]) -> tuple[int, ...] | None:
    return next((shapes[name] for name in names if name in shapes), None)
