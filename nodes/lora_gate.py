"""Apply a LoRA to a single band, or to each with a strength of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.patcher_extension
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor, nn

from ..freq_loss_plugin.config import FreqLossConfig
from ..freq_loss_plugin.lora_branch import (
    Bias,
    Branch,
    Dense,
    LowRank,
    attached,
    can_run_uncompiled,
    fits,
    weight_shape,
)
from ..freq_loss_plugin.lora_info import LoraFile, LoraFileError
from ..freq_loss_plugin.shaping import mix_bands
from . import core
from .inputs import band_options, check_unpacked, in_node_words, shown
from .lora_files import ReadsLora, file_input, load
from .lora_fit import apply, judge
from .schema import schema, widget


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
                file_input(),
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
        core.require(core.GATE, "Gate LoRA by Frequency Band")
        config = FreqLossConfig(**options)
        lora, weights = load(lora_name)
        warnings, applied, weights = judge(lora, weights, model, None)
        whole = start_percent <= 0 and end_percent >= 1
        if low_strength == high_strength and whole:
            adapted, _ = apply(lora, weights, model, None, low_strength, 0.0)
            applied += "\nequal strengths: applied as by the core loader"
        else:
            sampling = model.get_model_object("model_sampling")
            start = math.inf if start_percent <= 0 else sampling.percent_to_sigma(start_percent)
            end = -math.inf if end_percent >= 1 else sampling.percent_to_sigma(end_percent)
            gate = BandGate(_branches(lora, weights, model), low_strength, high_strength, start, end, config)
            adapted = _gated(model, gate, lora)
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
        check_unpacked(x, "the latent")
        self._config.check_size(*x.shape[-2:])
        _check_compiled(options)
        may_skip = self._check_cache(options)
        models = [model, *(each.model for each in options.get("multigpu_clones", {}).values())]
        layers = [
            {comfy.utils.get_attr(each, path): own for path, own in self._branches.items()}
            for each in dict.fromkeys(models)
        ]

        def with_strength(strength: float) -> list[Tensor]:
            with attached({layer: own for each in layers for layer, own in each.items()}, strength) as reached:
                predicted = predict(model, conds, x, timestep, options)
            if strength != 0 and not may_skip:
                _check_reached(layers, reached)
            return predicted

        low = with_strength(self._low)
        if self._low == self._high:
            return low
        high = with_strength(self._high)
        return [mix_bands(first, second, self._config) for first, second in zip(low, high, strict=True)]

    def _check_cache(self, options: dict[str, Any]) -> bool:
        """Whether the model may leave out this step."""
        cached = core.is_wrapped(options, core.CACHE)
        if cached and self._low != self._high:
            raise ValueError(
                "EasyCache would take what the model predicts with the LoRA at low_strength for what it predicts at "
                "high_strength; use LazyCache, or set both to the same"
            )
        return cached

    def release(self, _: Any) -> None:
        """After sampling: keep nothing on the device."""
        for own in self._branches.values():
            for branch in own:
                branch.release()


def _gated(model: Any, gate: BandGate, lora: LoraFile) -> Any:
    """A clone of a model with a gate."""
    adapted = model.clone()
    adapted.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "FreqLoss", gate)
    adapted.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_CLEANUP, "FreqLoss", gate.release)
    if lora.metadata and core.keeps_lora_metadata():
        adapted.set_attachments("lora_metadata", dict(lora.metadata))
    return adapted


def _check_compiled(options: dict[str, Any]) -> None:
    if core.is_wrapped(options, core.COMPILE) and not can_run_uncompiled():
        raise ValueError(
            f"the model is compiled, and PyTorch {torch.__version__} cannot run it uncompiled while the LoRA acts; "
            "update PyTorch to 2.6 or newer, or take TorchCompileModel out"
        )


def _check_reached(layers: list[dict[nn.Module, list[Branch]]], reached: set[nn.Module]) -> None:
    """Check that the LoRA has acted. A model may leave out layers; some INT8 layers run without being called.

    Args:
        layers: those that it adapts, for each copy of the model.
        reached: those that have run.

    Raises:
        ValueError: it has not.
    """
    used = [each for each in layers if not reached.isdisjoint(each)]
    if not used:
        raise ValueError(
            "the model has run without the layers that the LoRA adapts: another node has exchanged the model, or has "
            "skipped this step. Take that node out"
        )
    missed = [layer for layer in used[0] if layer not in reached and core.is_int8(layer)]
    if missed:
        raise ValueError(
            f"this model computes {len(missed)} of the {len(used[0])} layers that the LoRA adapts in INT8 together "
            "with their activation, where nothing can be added to them; use another quantization (FP8, GGUF, NVFP4) or "
            "a LoRA loader"
        )


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
        if kind == "weight" and weight_shape(layer) is None:
            raise LoraFileError(
                f"{lora.name} cannot be gated: {path} is a layer whose weight is packed in an unknown way, so nothing "
                "can be put beside it. Load it with a LoRA loader"
            )
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
    if kind == "bias":
        return Bias(patch[1][0]) if _kind(patch) == "diff" and offset is None and function is None else None
    shape = weight_shape(layer)
    if shape is None:  # checked before
        return None
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
