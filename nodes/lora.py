"""Load a LoRA with everything it says about itself on view, and apply one to a single band."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import comfy.lora
import comfy.lora_convert
import comfy.patcher_extension
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..freq_loss_plugin.config import FreqLossConfig
from ..freq_loss_plugin.lora_branch import Bias, Branch, Dense, LowRank, attached, fits
from ..freq_loss_plugin.lora_info import LoraFile, LoraFileError, mismatch_reason, module_of, read_lora
from ..freq_loss_plugin.shaping import mix_bands
from .inputs import band_options, in_node_words, log, shown
from .schema import schema, widget

_FOLDER = "loras"
_ENDINGS = (".safetensors", ".sft")

# ComfyUI's classes of models, by the family that a LoRA file tells. Subclasses count as their parents.
_FAMILIES = {
    "SD15": "SD1.x",
    "SD20": "SD2.x",
    "SDXL": "SDXL",
    "SD3": "SD3",
    "Flux": "FLUX.1",
    "Chroma": "Chroma",
    "Lumina2": "Lumina 2",
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


class ReadsLora(io.ComfyNode):
    """A node whose result depends on a file."""

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> str:
        """A file that was trained again under the same name is read again."""
        path = folder_paths.get_full_path(_FOLDER, lora_name)
        if path is None:
            return "missing"
        state = Path(path).stat()
        return f"{state.st_mtime_ns}:{state.st_size}"


class LoraLoader(ReadsLora):
    """Core's LoRA loader, with the file's own account of itself and of how well it fits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `freq_loss_plugin.lora_info`."""
        strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
        return schema(
            node_id="FreqLoss_LoraLoader",
            display_name="Load LoRA with Training Info",
            description="Applies a LoRA exactly as the core loader does, and shows in the node what it was trained on "
            "and how, whether it fits this model, and what does not. Reads safetensors only, never a pickle.",
            search_aliases=["lora", "load lora", "metadata", "trigger words"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model that the LoRA is applied to."),
                _file_input(),
                widget(io.Float, "strength_model", tooltip="Strength for the diffusion model; may be negative.",
                       **strength),
                widget(io.Float, "strength_clip", tooltip="Strength for the text encoder; may be negative.",
                       **strength),
                io.Clip.Input("clip", optional=True,
                              tooltip="The text encoder. Leave it out to adapt the diffusion model alone."),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="model", tooltip="The adapted diffusion model."),
                io.Clip.Output("clip_out", display_name="clip", tooltip="The adapted text encoder, if one was given."),
                io.String.Output("info", display_name="training info", tooltip="What the node shows, as a text."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    @in_node_words
    def execute(
        cls, model: Any, lora_name: str, strength_model: float, strength_clip: float, clip: Any = None
    ) -> io.NodeOutput:
        """Read the header, check the fit, then let core apply it."""
        lora, weights = _load(lora_name)
        warnings, applied, weights = _judge(lora, weights, model, clip)
        info = "\n".join([*(f"WARNING: {warning}" for warning in warnings), applied, lora.describe()])
        for warning in warnings:
            log.warning("freq_loss_plugin: %s: %s", lora_name, warning)
        adapted, adapted_clip = comfy.sd.load_lora_for_models(model, clip, weights, strength_model, strength_clip)
        return shown(cls, adapted, adapted_clip, info, text=info)


class LoraBandGate(ReadsLora):
    """A LoRA whose effect reaches each band with a strength of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `BandGate`."""
        strength = {"min": -10.0, "max": 10.0, "step": 0.01}
        return schema(
            node_id="FreqLoss_LoraBandGate",
            display_name="Gate LoRA by Frequency Band",
            description="The low band of every denoised prediction is that of the model with the LoRA at low_strength, "
            "the high band that of the model with the LoRA at high_strength: structure without texture, or the "
            "reverse. One more model call per step, and none where both strengths are equal.",
            search_aliases=["lora", "block weight", "structure", "texture", "style"],
            inputs=[
                io.Model.Input("model", tooltip="The model without this LoRA."),
                _file_input(),
                widget(io.Float, "low_strength", default=1.0, tooltip="Strength in the low band: structure.",
                       **strength),
                widget(io.Float, "high_strength", default=0.0, tooltip="Strength in the high band: texture.",
                       **strength),
                widget(io.Float, "start_percent", default=0.0, min=0.0, max=1.0, step=0.001,
                       tooltip="Where in sampling the LoRA begins to act; before that the model runs without it."),
                widget(io.Float, "end_percent", default=1.0, min=0.0, max=1.0, step=0.001,
                       tooltip="Where in sampling it ends."),
                *band_options(advanced=True),
            ],
            outputs=[io.Model.Output("model_out", display_name="model", tooltip="The model with the gated LoRA.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    @in_node_words
    def execute(
        cls,
        model: Any,
        lora_name: str,
        low_strength: float,
        high_strength: float,
        start_percent: float,
        end_percent: float,
        **options: Any,
    ) -> io.NodeOutput:
        """Add the gate to a clone of the model, or just the LoRA where a gate would change nothing."""
        if start_percent >= end_percent:
            raise ValueError(
                f"start_percent = {start_percent:g} and end_percent = {end_percent:g}: the LoRA would never act; the "
                "first must be smaller than the second"
            )
        config = FreqLossConfig(**options)
        lora, weights = _load(lora_name)
        warnings, applied, weights = _judge(lora, weights, model, None)
        whole = start_percent <= 0 and end_percent >= 1
        if low_strength == high_strength and whole:
            adapted, _ = comfy.sd.load_lora_for_models(model, None, weights, low_strength, 0.0)
            applied += "\nequal strengths: applied as by the core loader"
        else:
            adapted = model.clone()
            sampling = adapted.get_model_object("model_sampling")
            start = math.inf if start_percent <= 0 else sampling.percent_to_sigma(start_percent)
            end = -math.inf if end_percent >= 1 else sampling.percent_to_sigma(end_percent)
            gate = BandGate(_branches(lora, weights, model), low_strength, high_strength, start, end, config)
            adapted.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "FreqLoss", gate)
            adapted.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_CLEANUP, "FreqLoss", gate.release)
            calls = "one model call" if low_strength == high_strength else "two model calls"
            applied += f"\n{calls} in each step from {start_percent:.0%} to {end_percent:.0%}"
        text = "\n".join([*(f"WARNING: {warning}" for warning in warnings), applied])
        return shown(cls, adapted, text=text)


class BandGate:
    r"""Wraps ComfyUI's computation of the denoised predictions of one step.

    .. math:: \hat x_0 = low(\hat x_0^{s_{low}}) + high(\hat x_0^{s_{high}})

    where :math:`\hat x_0^s` is the prediction with the LoRA at strength s. Both bands are linear and so is
    classifier-free guidance, so each prediction is gated by itself. Outside the range of steps the model runs without
    the LoRA.

    Args:
        branches: the LoRA beside the layers of the model, by their paths.
        low_strength: s_low.
        high_strength: s_high.
        start_sigma: the LoRA acts where end_sigma < sigma <= start_sigma.
        end_sigma: see start_sigma.
        config: how the bands are made.
    """

    def __init__(
        self,
        branches: dict[str, list[Branch]],
        low_strength: float,
        high_strength: float,
        start_sigma: float,
        end_sigma: float,
        config: FreqLossConfig,
    ) -> None:
        self._branches, self._low, self._high = branches, low_strength, high_strength
        self._start, self._end, self._config = start_sigma, end_sigma, config

    @in_node_words
    def __call__(
        self,
        predict: Callable[..., list[Tensor]],
        model: Any,
        conds: list[Any],
        x: Tensor,
        timestep: Tensor,
        options: dict[str, Any],
    ) -> list[Tensor]:
        """Predict once or twice, and mix the bands."""
        if not self._end < float(timestep[0]) <= self._start:
            return predict(model, conds, x, timestep, options)
        self._config.check_size(*x.shape[-2:])
        layers = {comfy.utils.get_attr(model, path): own for path, own in self._branches.items()}
        with attached(layers, self._low):
            low = predict(model, conds, x, timestep, options)
        if self._low == self._high:
            return low
        with attached(layers, self._high):
            high = predict(model, conds, x, timestep, options)
        return [mix_bands(first, second, self._config) for first, second in zip(low, high, strict=True)]

    def release(self, _: Any) -> None:
        """After sampling: keep nothing on the device."""
        for own in self._branches.values():
            for branch in own:
                branch.release()


def lora_files() -> list[str]:
    """The names of all .safetensors files in models/loras."""
    return [name for name in folder_paths.get_filename_list(_FOLDER) if name.lower().endswith(_ENDINGS)]


def header_of(lora_name: str) -> LoraFile:
    """What the file of this name says of itself.

    Raises:
        LoraFileError: see `freq_loss_plugin.lora_info.read_lora`.
    """
    return read_lora(_path(lora_name))


def _file_input() -> io.Input:
    return widget(io.Combo, "lora_name", options=lora_files(), tooltip="A .safetensors file in models/loras.")


def _path(lora_name: str) -> str:
    path = folder_paths.get_full_path(_FOLDER, lora_name)
    if path is None or not lora_name.lower().endswith(_ENDINGS):
        raise LoraFileError(
            f"{lora_name} is not in models/loras, or no .safetensors file; copy it there and refresh (R)"
        )
    return path


def _load(lora_name: str) -> tuple[LoraFile, dict[str, Tensor]]:
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


def _finite(weight: Tensor) -> bool:
    return bool(torch.isfinite(weight.float()).all())


def _judge(
    lora: LoraFile, weights: dict[str, Tensor], model: Any, clip: Any
) -> tuple[list[str], str, dict[str, Tensor]]:
    """Warnings, how many modules are applied, and the weights without those that have no place by their size.

    Raises:
        LoraFileError: not a single module fits.
    """
    family = _family(model)
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    state = model.model_state_dict()
    if clip is not None:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
        state = {**state, **clip.cond_stage_model.state_dict()}
    fit = _fit(weights, keys, state)
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


def _fit(weights: dict[str, Tensor], keys: dict[str, Any], state: dict[str, Tensor]) -> Fit:
    """Compare a LoRA, after core's own renaming, with the layers of a model."""
    converted = comfy.lora_convert.convert_lora(weights)
    shapes = {key: tuple(weight.shape) for key, weight in converted.items()}
    matched, unknown, misshapen = [], [], []
    for name in LoraFile("", {}, shapes).modules:
        if name not in keys:
            unknown.append(name)
        elif _same_size(name, shapes, keys[name], state):
            matched.append(name)
        else:
            misshapen.append(name)
    return Fit(tuple(matched), tuple(unknown), tuple(misshapen))


def _same_size(name: str, shapes: dict[str, tuple[int, ...]], key: Any, state: dict[str, Tensor]) -> bool:
    """Whether up·down has as many values as the layer. Other kinds than plain LoRA are left to core to judge."""
    up = _first(shapes, (f"{name}.lora_up.weight", f"{name}.lora_B.weight", f"{name}.lora.up.weight"))
    down = _first(shapes, (f"{name}.lora_down.weight", f"{name}.lora_A.weight", f"{name}.lora.down.weight"))
    if up is None or down is None or f"{name}.lora_mid.weight" in shapes or not isinstance(key, str):
        return True
    return key not in state or up[0] * math.prod(down[1:]) == state[key].numel()


def _first(shapes: dict[str, tuple[int, ...]], names: Iterable[str]) -> tuple[int, ...] | None:
    return next((shapes[name] for name in names if name in shapes), None)


def _family(model: Any) -> str | None:
    """The family of a ComfyUI model, in the words of `LoraFile.base_model`; None for those not listed."""
    classes = type(model.model.model_config).__mro__
    return next((_FAMILIES[each.__name__] for each in classes if each.__name__ in _FAMILIES), None)


def _branches(lora: LoraFile, weights: dict[str, Tensor], model: Any) -> dict[str, list[Branch]]:
    """The LoRA as branches beside the layers of a model, by their paths.

    Raises:
        LoraFileError: its kind is not a sum that is added to a layer.
    """
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(weights), keys, log_missing=False)
    found: dict[str, list[Branch]] = {}
    for target, patch in patches.items():
        key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None, None)[:3]
        path, _, kind = key.rpartition(".")
        layer = comfy.utils.get_attr(model.model, path)
        branch = _branch(patch, key, kind, offset, function, layer) if fits(layer) else None
        if branch is None:
            raise LoraFileError(
                f"{lora.name} cannot be gated: {path} is adapted in a way that is no addition to a layer "
                f"({_kind(patch)}); the gate takes LoRA, LoHa and LoKr without DoRA. Load it with a LoRA loader"
            )
        found.setdefault(path, []).append(branch)
    return found


def _branch(patch: Any, key: str, kind: str, offset: Any, function: Any, layer: Any) -> Branch | None:
    """One entry of what core has read from a LoRA file as a branch; None where it is none."""
    shape = getattr(layer, kind).shape
    if kind == "bias":
        return Bias(patch[1][0]) if _kind(patch) == "diff" and offset is None and function is None else None
    if _kind(patch) not in ("lora", "loha", "lokr", "diff") or _has_dora(patch):
        return None
    if _kind(patch) == "lora" and function is None and (offset is None or offset[0] == 0):
        up, down, alpha, mid, _, reshape = patch.weights
        if reshape is not None:
            return None
        if mid is None:
            scale = 1.0 if alpha is None else alpha / down.shape[0]
            rows = (0, 0) if offset is None else (offset[1], shape[0] - offset[1] - offset[2])
            return LowRank(up, down, scale, rows)

    def make(device: torch.device) -> Tensor:
        # Core adds the change to a weight; to nothing, that is the change itself.
        return comfy.lora.calculate_weight(
            [(1.0, patch, 1.0, offset, function)], torch.zeros(shape, device=device), key
        )

    return Dense(make)


def _kind(patch: Any) -> str:
    return getattr(patch, "name", None) or str(patch[0])


def _has_dora(patch: Any) -> bool:
    """LoRA's magnitudes (DoRA) come fifth, those of LoHa and LoKr last."""
    position = {"lora": 4, "loha": -1, "lokr": -1}.get(_kind(patch))
    return position is not None and patch.weights[position] is not None
