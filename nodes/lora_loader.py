"""Load a LoRA with everything it says about itself on view."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import core
from .inputs import in_node_words, log, shown
from .lora_files import ReadsLora, file_input, load
from .lora_fit import apply, judge
from .schema import schema, widget


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
                file_input(),
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
        core.require(core.LORA, "Load LoRA with Training Info")
        lora, weights = load(lora_name)
        warnings, applied, weights = judge(lora, weights, model, clip)
        info = "\n".join([*(f"WARNING: {warning}" for warning in warnings), applied, lora.describe()])
        for warning in warnings:
            log.warning("freq_loss_plugin: %s: %s", lora_name, warning)
        adapted, adapted_clip = apply(lora, weights, model, clip, strength_model, strength_clip)
        return shown(cls, adapted, adapted_clip, info, text=info)
