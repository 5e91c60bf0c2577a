"""Check whether a LoRA fits a model, and apply it as core does."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import comfy.lora
import comfy.lora_convert
import comfy.sd
import comfy.utils
from torch import Tensor

from ..freq_loss_plugin.lora.metadata import LoraFile, LoraFileError, mismatch_reason, module_of
from ..freq_loss_plugin.lora.side_branch import weight_shape
from . import core

# ComfyUI's own model classes, and the family of each as `LoraFile.base_model` names it. Subclasses are other models as
# often as variants (Flux2 is a subclass of Flux), so the variants are listed, too.
_FAMILIES = {
    "SD15": "SD1.x",
    "SD15_instructpix2pix": "SD1.x",
    "SD20": "SD2.x",
    "SD21UnclipL": "SD2.x",
    "SD21UnclipH": "SD2.x",
    "SDXL": "SDXL",
    "SSD1B": "SDXL",
    "Segmind_Vega": "SDXL",
    "KOALA_700M": "SDXL",
    "KOALA_1B": "SDXL",
    "SDXL_instructpix2pix": "SDXL",
    "SD3": "SD3",
    "Flux": "FLUX.1",
    "FluxInpaint": "FLUX.1",
    "FluxSchnell": "FLUX.1",
    "Flux2": "FLUX.2",
    "Chroma": "Chroma",
    "Lumina2": "Lumina 2",
    "ZImage": "Z-Image",
    "HunyuanImage21": "HunyuanImage 2.1",
    "Anima": "Anima",
}

_GUIDANCE_TOKEN_WARNING = (
    "trained with a guidance token: it expects an image's CLIP features in place of the last text token; put the node "
    "Guidance Token after the positive prompt"
)


class FitReport(NamedTuple):
    """How a LoRA fits a model."""

    warnings: tuple[str, ...]
    summary: str
    """How many of its modules are applied."""
    weights: dict[str, Tensor]
    """Its tensors, without those of modules whose size is not that of the layer."""

    def describe(self) -> str:
        """Warnings and summary, one a line."""
        return "\n".join([*(f"WARNING: {warning}" for warning in self.warnings), self.summary])


class ModuleMatch(NamedTuple):
    """The names of a LoRA's modules, by how they match the layers of a model."""

    matched: tuple[str, ...]
    unknown: tuple[str, ...]
    """No layer of the model has this name."""
    wrong_size: tuple[str, ...]
    """The layer of this name has another size."""


def check_fit(lora: LoraFile, weights: dict[str, Tensor], model: Any, clip: Any) -> FitReport:
    """Compare a LoRA with a model, before core applies it.

    Args:
        lora: the file's header.
        weights: its tensors.
        model: ComfyUI's model patcher.
        clip: ComfyUI's text encoder, or None.

    Raises:
        LoraFileError: none of the modules fits.
    """
    family = _model_family(model)
    match = _match_modules(weights, model, clip)
    # Where no text encoder is connected, its modules are not expected to fit.
    skipped = set(lora.text_encoder_modules) if clip is None else set()
    misfits = [name for name in (*match.unknown, *match.wrong_size) if name not in skipped]
    expected = len(match.matched) + len(misfits)
    reason = mismatch_reason(lora, family, match.wrong_size)
    if not match.matched:
        raise LoraFileError(
            f"{lora.name} does not fit: none of its {expected} modules matches a layer of this model"
            f"{f' ({family})' if family else ''}. Likely reason: {reason}. Choose a LoRA that was trained on this kind "
            "of model"
        )
    warnings = []
    if lora.base_model and family and lora.base_model != family:
        warnings.append(f"trained on {lora.base_model}, and this model is {family}")
    if misfits:
        warnings.append(
            f"only {len(match.matched)} of {expected} modules fit; likely reason: {reason} (the first is {misfits[0]})"
        )
    if lora.has_guidance_token:
        warnings.append(_GUIDANCE_TOKEN_WARNING)
    summary = f"applied: {len(match.matched)} of {expected} modules"
    if skipped:
        summary += f"; {len(skipped)} of the text encoder are skipped, since no clip is connected"
    kept = {key: weight for key, weight in weights.items() if module_of(key) not in match.wrong_size}
    return FitReport(tuple(warnings), summary, kept)


def apply_lora(
    lora: LoraFile, weights: dict[str, Tensor], model: Any, clip: Any, strength: float, strength_clip: float
) -> tuple[Any, Any]:
    """Model and text encoder with a LoRA applied, exactly as core's LoraLoader does.

    Args:
        lora: the file's header; newer versions of core keep its metadata with the model.
        weights: its tensors.
        model: ComfyUI's model patcher.
        clip: ComfyUI's text encoder, or None.
        strength: of the LoRA in the model.
        strength_clip: of the LoRA in the text encoder.
    """
    if strength == 0 and (strength_clip == 0 or clip is None):
        return model, clip
    metadata = dict(lora.metadata) or None
    return core.call_supported(
        comfy.sd.load_lora_for_models, model, clip, weights, strength, strength_clip, lora_metadata=metadata
    )


def _match_modules(weights: dict[str, Tensor], model: Any, clip: Any) -> ModuleMatch:
    """Compare a LoRA, after core's own renaming, with the layers of a model."""
    targets = {key: (model.model, target) for key, target in comfy.lora.model_lora_keys_unet(model.model, {}).items()}
    if clip is not None:
        encoder = clip.cond_stage_model
        targets |= {key: (encoder, target) for key, target in comfy.lora.model_lora_keys_clip(encoder, {}).items()}
    converted = comfy.lora_convert.convert_lora(weights)
    shapes = {key: tuple(weight.shape) for key, weight in converted.items()}
    matched, unknown, wrong_size = [], [], []
    for name in LoraFile("", {}, shapes).modules:
        if name not in targets:
            unknown.append(name)
        elif _has_layer_size(name, shapes, *targets[name]):
            matched.append(name)
        else:
            wrong_size.append(name)
    return ModuleMatch(tuple(matched), tuple(unknown), tuple(wrong_size))


def _has_layer_size(name: str, shapes: dict[str, tuple[int, ...]], model: Any, target: Any) -> bool:
    """Whether up·down has as many values as the layer's weight; True, as in core, where that cannot be determined."""
    up = _first_shape(shapes, (f"{name}.lora_up.weight", f"{name}.lora_B.weight", f"{name}.lora.up.weight"))
    down = _first_shape(shapes, (f"{name}.lora_down.weight", f"{name}.lora_A.weight", f"{name}.lora.down.weight"))
    changes_size = f"{name}.lora_mid.weight" in shapes or f"{name}.reshape_weight" in shapes
    if up is None or down is None or changes_size or not isinstance(target, str):
        return True
    path, _, parameter = target.rpartition(".")
    try:
        shape = weight_shape(comfy.utils.get_attr(model, path)) if parameter == "weight" else None
    except AttributeError:
        return True
    return shape is None or up[0] * math.prod(down[1:]) == math.prod(shape)


def _first_shape(shapes: dict[str, tuple[int, ...]], names: Iterable[str]) -> tuple[int, ...] | None:
    return next((shapes[name] for name in names if name in shapes), None)


def _model_family(model: Any) -> str | None:
    """The family of a ComfyUI model, as `LoraFile.base_model` names it; None for those not listed.

    A class of another pack counts as the class of ComfyUI that it is derived from.
    """
    classes = type(model.model.model_config).__mro__
    known = next((base for base in classes if base.__module__ == "comfy.supported_models"), None)
    return None if known is None else _FAMILIES.get(known.__name__)
