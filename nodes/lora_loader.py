"""Load a LoRA, and show its training metadata and how well it fits the model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..freq_loss_plugin.lora.metadata import LoraFileError
from . import core
from .inputs import log, node_output
from .lora_files import SWITCHED_OFF, LoraFileNode, load_lora, lora_input, read_header
from .lora_fit import apply_lora, check_fit
from .schema import schema, widget


class LoraLoader(LoraFileNode):
    """Core's LoRA loader, with the file's training metadata and a report on its fit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `freq_loss_plugin.lora.metadata`."""
        strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
        return schema(
            node_id="FreqLoss_LoraLoader",
            display_name="Load LoRA with Training Info",
            description="Applies a LoRA exactly as the core loader does, and shows its training metadata and whether "
            "it fits this model. Reads safetensors only, never a pickle.",
            search_aliases=["lora", "load lora", "metadata", "trigger words"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model that the LoRA is applied to."),
                lora_input(),
                widget(io.Float, "strength_model", tooltip="Strength for the diffusion model; may be negative.",
                       **strength),
                widget(io.Float, "strength_clip", tooltip="Strength for the text encoder; may be negative.",
                       **strength),
                io.Clip.Input("clip", optional=True,
                              tooltip="The text encoder. If not connected, only the diffusion model is adapted."),
            ],
            outputs=[
                io.Model.Output("model_out", display_name="model", tooltip="The adapted diffusion model."),
                io.Clip.Output("clip_out", display_name="clip", tooltip="The adapted text encoder, if one was given."),
                io.String.Output("info", display_name="training info", tooltip="The text that the node shows."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, lora_name: str, strength_model: float, strength_clip: float, clip: Any = None
    ) -> io.NodeOutput:
        """Read the header, check the fit, then let core apply it."""
        if strength_model == 0 and (strength_clip == 0 or clip is None):
            info = f"{SWITCHED_OFF}\n{_describe_file(lora_name)}"
            return node_output(cls, model, clip, info, text=info)
        core.require(core.LORA, "Load LoRA with Training Info")
        lora, weights = load_lora(lora_name)
        fit = check_fit(lora, weights, model, clip, strength_model, strength_clip)
        for warning in fit.warnings:
            log.warning("freq_loss_plugin: %s: %s", lora_name, warning)
        adapted, adapted_clip = apply_lora(lora, fit.weights, model, clip, strength_model, strength_clip)
        info = f"{fit.describe()}\n{lora.describe()}"
        return node_output(cls, adapted, adapted_clip, info, text=info)


def _describe_file(lora_name: str) -> str:
    """The training metadata, or what is wrong with a file that is not applied."""
    try:
        return read_header(lora_name).describe()
    except LoraFileError as error:
        return str(error)
