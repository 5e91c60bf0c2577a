"""Whether a LoRA fits a model, and how it is applied as core applies it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import comfy.lora
import comfy.lora_convert
import comfy.sd
import comfy.utils
from torch import Tensor

from ..freq_loss_plugin.lora_branch import weight_shape
from ..freq_loss_plugin.lora_info import LoraFile, LoraFileError, mismatch_reason, module_of
from . import core

# ComfyUI's own classes of models, by the family that a LoRA file tells. Their subclasses are other models as often as
# variants (Flux2 is one of Flux), so the variants are named here, too.
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


class Fit(NamedTuple):
    """How the modules of a LoRA file meet a model."""

    matched: tuple[str, ...]
    unknown: tuple[str, ...]
    """No layer of the model has their name."""
    misshapen: tuple[str, ...]
    """A layer has their name and another size."""


def judge(
    lora: LoraFile, weights: dict[str, Tensor], model: Any, clip: Any
) -> tuple[list[str], str, dict[str, Tensor]]:
    """Compare a LoRA with a model, before core applies it.

    Args:
        lora: the file's header.
        weights: its tensors.
        model: ComfyUI's model patcher.
        clip: ComfyUI's text encoder, or None.

    Returns:
        Warnings, how many modules are applied, and the weights without those that have no place by their size.

    Raises:
        LoraFileError: not a single module fits.
    """
    family = _family(model)
    fit = _fit(weights, model, clip)
    # Without a text encoder at hand, its modules are not expected to fit.
    skipped = set(lora.text_encoder_modules) if clip is None else set()
    misfits = [name for name in (*fit.unknown, *fit.misshapen) if name not in skipped]
    expected = len(fit.matched) + len(misfits)
    reason = mismatch_reason(lora, family, fit.misshapen)
    if not fit.matched:
        raise LoraFileError(
            f"{lora.name} does not fit: none of its {expected} modules has a place in this model"
            f"{f' ({family})' if family else ''}. Likely reason: {reason}. Choose a LoRA that was trained on this kind "
            "of model"
        )
    warnings = []
    if lora.base_model and family and lora.base_model != family:
        warnings.append(f"trained on {lora.base_model}, and this model is {family}")
    if misfits:
        warnings.append(
            f"only {len(fit.matched)} of {expected} modules fit; likely reason: {reason} (the first is {misfits[0]})"
        )
    if lora.has_guidance_token:
        warnings.append(
            "trained with a guidance token: it expects an image's CLIP features in place of the last text token; put "
            "the node Guidance Token behind the positive prompt"
        )
    applied = f"applied: {len(fit.matched)} of {expected} modules"
    if skipped:
        applied += f"; {len(skipped)} of the text encoder are left out, there is no clip here"
    return warnings, applied, {key: weight for key, weight in weights.items() if module_of(key) not in fit.misshapen}


def apply(
    lora: LoraFile, weights: dict[str, Tensor], model: Any, clip: Any, strength: float, strength_clip: float
) -> tuple[Any, Any]:
    """Model and text encoder with a LoRA, exactly as core's LoraLoader makes them.

    Args:
        lora: the file's header; newer versions of core keep its metadata with the model.
        weights: its tensors.
        model: ComfyUI's model patcher.
        clip: ComfyUI's text encoder, or None.
        strength: for the model.
        strength_clip: for the text encoder.
    """
    if strength == 0 and (strength_clip == 0 or clip is None):
        return model, clip
    metadata = dict(lora.metadata) or None
    return core.call(
        comfy.sd.load_lora_for_models, model, clip, weights, strength, strength_clip, lora_metadata=metadata
    )


def _fit(weights: dict[str, Tensor], model: Any, clip: Any) -> Fit:
    """Compare a LoRA, after core's own renaming, with the layers of a model."""
    keys = {key: (model.model, target) for key, target in comfy.lora.model_lora_keys_unet(model.model, {}).items()}
    if clip is not None:
        encoder = clip.cond_stage_model
        keys |= {key: (encoder, target) for key, target in comfy.lora.model_lora_keys_clip(encoder, {}).items()}
    converted = comfy.lora_convert.convert_lora(weights)
    shapes = {key: tuple(weight.shape) for key, weight in converted.items()}
    matched, unknown, misshapen = [], [], []
    for name in LoraFile("", {}, shapes).modules:
        if name not in keys:
            unknown.append(name)
        elif _same_size(name, shapes, *keys[name]):
            matched.append(name)
        else:
            misshapen.append(name)
    return Fit(tuple(matched), tuple(unknown), tuple(misshapen))


def _same_size(name: str, shapes: dict[str, tuple[int, ...]], model: Any, target: Any) -> bool:
    """Whether up·down has as many values as the layer. What cannot be compared is left to core to judge."""
    up = _first(shapes, (f"{name}.lora_up.weight", f"{name}.lora_B.weight", f"{name}.lora.up.weight"))
    down = _first(shapes, (f"{name}.lora_down.weight", f"{name}.lora_A.weight", f"{name}.lora.down.weight"))
    changes_size = f"{name}.lora_mid.weight" in shapes or f"{name}.reshape_weight" in shapes
    if up is None or down is None or changes_size or not isinstance(target, str):
        return True
    path, _, kind = target.rpartition(".")
    try:
        shape = weight_shape(comfy.utils.get_attr(model, path)) if kind == "weight" else None
    except AttributeError:
        return True
    return shape is None or up[0] * math.prod(down[1:]) == math.prod(shape)


def _first(shapes: dict[str, tuple[int, ...]], names: Iterable[str]) -> tuple[int, ...] | None:
    return next((shapes[name] for name in names if name in shapes), None)


def _family(model: Any) -> str | None:
    """The family of a ComfyUI model, in the words of `LoraFile.base_model`; None for those not listed.

    Classes of other packs count as the class of ComfyUI that they are made of.
    """
    classes = type(model.model.model_config).__mro__
    own = next((each for each in classes if each.__module__ == "comfy.supported_models"), None)
    return None if own is None else _FAMILIES.get(own.__name__)
