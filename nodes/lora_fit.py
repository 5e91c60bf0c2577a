"""Check whether a LoRA fits a model, and apply it as core does."""

from __future__ import annotations

from typing import Any, NamedTuple

import comfy.sd
from torch import Tensor

from ..freq_loss_plugin.lora.metadata import LoraFile, LoraFileError, mismatch_reason
from . import core
from .lora_match import ModuleMatch, describe_unused, match_modules

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


def check_fit(
    lora: LoraFile, weights: dict[str, Tensor], model: Any, clip: Any, strength: float = 1.0, strength_clip: float = 1.0
) -> FitReport:
    """Compare a LoRA with a model, before core applies it.

    Args:
        lora: the file's header.
        weights: its tensors.
        model: ComfyUI's model patcher.
        clip: ComfyUI's text encoder, or None.
        strength: of the LoRA in the model; with 0 its modules there are not expected to fit.
        strength_clip: of the LoRA in the text encoder; the same.

    Raises:
        LoraFileError: none of the modules fits.
    """
    family = _model_family(model)
    match = match_modules(weights, model if strength != 0 else None, clip if strength_clip != 0 else None)
    skipped = _skipped_modules(match, clip, strength, strength_clip)
    skipped_names = {name for names in skipped.values() for name in names}
    misfits = [name for name in (*match.unknown, *match.wrong_size) if name not in skipped_names]
    expected = len(match.matched) + len(misfits)
    reason = mismatch_reason(lora, family, match.wrong_size)
    if misfits and not match.matched:
        raise LoraFileError(
            f"{lora.name} does not fit: none of its {expected} modules matches a layer of this model"
            f"{f' ({family})' if family else ''}. Likely reason: {reason}. Choose a LoRA that was trained on this kind "
            "of model"
        )
    if not expected and strength != 0 and clip is None:
        raise LoraFileError(
            f"{lora.name} would have no effect: all of its {len(skipped_names)} modules are of the text encoder, and "
            "no clip is connected. Use the node Load LoRA with Training Info, and connect the text encoder to its clip"
        )
    warnings = [] if expected else ["no effect, since all of its modules are skipped"]
    if lora.base_model and family and lora.base_model != family:
        warnings.append(f"trained on {lora.base_model}, and this model is {family}")
    if misfits:
        warnings.append(
            f"only {len(match.matched)} of {expected} modules fit; likely reason: {reason} (the first is {misfits[0]})"
        )
    if match.unused:
        warnings.append(describe_unused(match))
    if lora.has_guidance_token:
        warnings.append(_GUIDANCE_TOKEN_WARNING)
    parts = [f"applied: {len(match.matched)} of {expected} modules"]
    parts += [f"{len(names)} {of_what}" for of_what, names in skipped.items()]
    return FitReport(tuple(warnings), "; ".join(parts), match.weights)


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
    metadata = dict(lora.metadata) or None
    return core.call_supported(
        comfy.sd.load_lora_for_models, model, clip, weights, strength, strength_clip, lora_metadata=metadata
    )


def _skipped_modules(match: ModuleMatch, clip: Any, strength: float, strength_clip: float) -> dict[str, list[str]]:
    """The modules of what is not to be adapted, by where they are and why they are skipped."""
    why_not_clip = "no clip is connected" if clip is None else "strength_clip is 0" if strength_clip == 0 else ""
    skipped = {}
    if why_not_clip:
        names = [name for name in match.unknown if name in match.text_encoder]
        skipped[f"of the text encoder are skipped, since {why_not_clip}"] = names
    if strength == 0:
        names = [name for name in match.unknown if name not in match.text_encoder]
        skipped["of the diffusion model are skipped, since strength_model is 0"] = names
    return {of_what: names for of_what, names in skipped.items() if names}


def _model_family(model: Any) -> str | None:
    """The family of a ComfyUI model, as `LoraFile.base_model` names it; None for those not listed.

    A class of another pack counts as the class of ComfyUI that it is derived from.
    """
    classes = type(model.model.model_config).__mro__
    known = next((base for base in classes if base.__module__ == "comfy.supported_models"), None)
    return None if known is None else _FAMILIES.get(known.__name__)
