"""Apply a LoRA to one frequency band, or to both with different strengths."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comfy.patcher_extension
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor, nn

from ..freq_loss_plugin.analysis.mixing import mix_bands
from ..freq_loss_plugin.lora.metadata import LoraFile
from ..freq_loss_plugin.lora.side_branch import Branch, attached, can_run_uncompiled
from ..freq_loss_plugin.loss.bands import Method
from ..freq_loss_plugin.loss.params import BandSpec
from . import core
from .inputs import band_inputs, check_not_packed, node_output
from .lora_branches import lora_branches
from .lora_files import SWITCHED_OFF, LoraFileNode, load_lora, lora_input
from .lora_fit import apply_lora, check_fit
from .schema import schema, widget


class LoraBandGate(LoraFileNode):
    """A LoRA with a strength of its own in each band."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `BandGate`."""
        strength = {"min": -10.0, "max": 10.0, "step": 0.01}
        return schema(
            node_id="FreqLoss_LoraBandGate",
            display_name="Gate LoRA by Frequency Band",
            description="The low band of every denoised prediction comes from the model with the LoRA at low_strength, "
            "the high band from the model with the LoRA at high_strength: structure without texture, or the reverse. "
            "Costs one extra model call per step, and none where both strengths are equal.",
            search_aliases=["lora", "block weight", "structure", "texture", "style"],
            inputs=[
                io.Model.Input("model", tooltip="The model without this LoRA; it may be compiled (TorchCompileModel)."),
                lora_input(),
                widget(io.Float, "low_strength", default=1.0, tooltip="Strength in the low band: structure.",
                       **strength),
                widget(io.Float, "high_strength", default=0.0, tooltip="Strength in the high band: texture.",
                       **strength),
                widget(io.Float, "start_percent", default=0.0, min=0.0, max=1.0, step=0.001,
                       tooltip="The point of sampling at which the LoRA begins to act; before that the model runs "
                       "without it."),
                widget(io.Float, "end_percent", default=1.0, min=0.0, max=1.0, step=0.001,
                       tooltip="The point of sampling at which the LoRA stops acting."),
                *band_inputs(advanced=True),
            ],
            outputs=[io.Model.Output("model_out", display_name="model", tooltip="The model with the gated LoRA.")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Any,
        lora_name: str,
        low_strength: float,
        high_strength: float,
        start_percent: float,
        end_percent: float,
        method: Method,
        wavelet: str,
        levels: int,
        cutoff: float,
    ) -> io.NodeOutput:
        """Add the gate to a clone of the model, or only the LoRA where a gate would make no difference."""
        if low_strength == high_strength == 0:
            return node_output(cls, model, text=SWITCHED_OFF)
        if start_percent >= end_percent:
            raise ValueError(
                f"start_percent = {start_percent:g} and end_percent = {end_percent:g}: the LoRA would never act; the "
                "first must be smaller than the second"
            )
        core.require(core.GATE, "Gate LoRA by Frequency Band")
        bands = BandSpec(method, wavelet, levels, cutoff)
        lora, weights = load_lora(lora_name)
        fit = check_fit(lora, weights, model, None)
        equal_strengths = low_strength == high_strength
        if equal_strengths and start_percent <= 0 and end_percent >= 1:
            adapted, _ = apply_lora(lora, fit.weights, model, None, low_strength, 0.0)
            effect = "equal strengths: applied as by the core loader"
        else:
            sigmas = _sigma_range(model, start_percent, end_percent)
            gate = BandGate(lora_branches(lora, fit.weights, model), low_strength, high_strength, *sigmas, bands)
            adapted = _with_gate(model, gate, lora)
            calls = "one model call" if equal_strengths else "two model calls"
            effect = f"{calls} in each step from {start_percent:.0%} to {end_percent:.0%}"
        return node_output(cls, adapted, text=f"{fit.describe()}\n{effect}")


class BandGate:
    r"""Wraps ComfyUI's computation of the denoised predictions of one step.

    .. math:: \hat x_0 = low(\hat x_0^{s_{low}}) + high(\hat x_0^{s_{high}})

    where :math:`\hat x_0^s` is the prediction with the LoRA at strength s. The bands and classifier-free guidance are
    linear, so the conditional and the unconditional prediction are gated separately. Outside the range of steps the
    model runs without the LoRA.

    Args:
        branches: the LoRA beside the layers of the model, by their paths.
        low_strength: s_low.
        high_strength: s_high.
        start_sigma: the LoRA acts where end_sigma < sigma <= start_sigma.
        end_sigma: see start_sigma.
        bands: how predictions are split.
    """

    def __init__(
        self,
        branches: dict[str, list[Branch]],
        low_strength: float,
        high_strength: float,
        start_sigma: float,
        end_sigma: float,
        bands: BandSpec,
    ) -> None:
        self._branches, self._low_strength, self._high_strength = branches, low_strength, high_strength
        self._start_sigma, self._end_sigma, self._bands = start_sigma, end_sigma, bands

    def __call__(
        self,
        predict: Callable[..., list[Tensor]],
        model: Any,
        conds: list[Any],
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any],
    ) -> list[Tensor]:
        """Predict once or twice, and mix the bands.

        Raises:
            ValueError: the latent is too small or packed, the model cannot be gated, or the LoRA has had no effect.
        """
        if not self._end_sigma < float(timestep[0]) <= self._start_sigma:
            return predict(model, conds, x, timestep, model_options)
        check_not_packed(x, "the latent")
        self._bands.check_size(*x.shape[-2:])
        _check_compiled(model_options)
        may_skip_model = self._check_cache(model_options)
        layers_by_model = self._find_layers(model, model_options)

        def predict_with_strength(strength: float) -> list[Tensor]:
            branches = {layer: branches for layers in layers_by_model for layer, branches in layers.items()}
            with attached(branches, strength) as executed:
                predictions = predict(model, conds, x, timestep, model_options)
            if strength != 0 and not may_skip_model:
                _check_executed(layers_by_model, executed)
            return predictions

        low = predict_with_strength(self._low_strength)
        if self._low_strength == self._high_strength:
            return low
        high = predict_with_strength(self._high_strength)
        return [mix_bands(*predictions, self._bands) for predictions in zip(low, high, strict=True)]

    def release(self, _: Any) -> None:
        """Free the branches' memory on the device; ComfyUI calls this after sampling."""
        for branches in self._branches.values():
            for branch in branches:
                branch.release()

    def _find_layers(self, model: Any, model_options: dict[str, Any]) -> list[dict[nn.Module, list[Branch]]]:
        """The adapted layers and their branches, for the model and each of its copies on other GPUs."""
        copies = (patcher.model for patcher in model_options.get("multigpu_clones", {}).values())
        return [
            {comfy.utils.get_attr(module, path): branches for path, branches in self._branches.items()}
            for module in dict.fromkeys((model, *copies))
        ]

    def _check_cache(self, model_options: dict[str, Any]) -> bool:
        """Whether EasyCache may skip the model in this step; raises ValueError where it would mix up the strengths."""
        cached = core.has_wrapper(model_options, core.EASY_CACHE)
        if cached and self._low_strength != self._high_strength:
            raise ValueError(
                "EasyCache would reuse the prediction with the LoRA at low_strength for the one at high_strength; use "
                "LazyCache, or set both strengths to the same value"
            )
        return cached


def _sigma_range(model: Any, start_percent: float, end_percent: float) -> tuple[float, float]:
    """The noise levels (start, end) of two points of sampling; infinite at its ends."""
    sampling = model.get_model_object("model_sampling")
    start = math.inf if start_percent <= 0 else sampling.percent_to_sigma(start_percent)
    end = -math.inf if end_percent >= 1 else sampling.percent_to_sigma(end_percent)
    return start, end


def _with_gate(model: Any, gate: BandGate, lora: LoraFile) -> Any:
    """A clone of a model with a gate."""
    adapted = model.clone()
    adapted.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "FreqLoss", gate)
    adapted.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_CLEANUP, "FreqLoss", gate.release)
    if lora.metadata and core.keeps_lora_metadata():
        adapted.set_attachments("lora_metadata", dict(lora.metadata))
    return adapted


def _check_compiled(model_options: dict[str, Any]) -> None:
    if core.has_wrapper(model_options, core.TORCH_COMPILE) and not can_run_uncompiled():
        raise ValueError(
            f"the model is compiled, and PyTorch {torch.__version__} cannot run it uncompiled while the LoRA acts; "
            "update PyTorch to 2.6 or newer, or remove TorchCompileModel"
        )


def _check_executed(layers_by_model: list[dict[nn.Module, list[Branch]]], executed: set[nn.Module]) -> None:
    """Check that the LoRA has had an effect: models may skip layers, and some INT8 layers run without being called.

    Args:
        layers_by_model: the adapted layers of each copy of the model.
        executed: the layers that were called.

    Raises:
        ValueError: none was called, or INT8 layers were not.
    """
    used = [layers for layers in layers_by_model if not executed.isdisjoint(layers)]
    if not used:
        raise ValueError(
            "the model has run without the layers that the LoRA adapts: another node has replaced the model, or has "
            "skipped this step. Remove that node"
        )
    missed = [layer for layer in used[0] if layer not in executed and core.is_int8(layer)]
    if missed:
        raise ValueError(
            f"this model computes {len(missed)} of the {len(used[0])} layers that the LoRA adapts in INT8 together "
            "with their activation, where nothing can be added to them; use another quantization (FP8, GGUF, NVFP4) or "
            "a LoRA loader"
        )
