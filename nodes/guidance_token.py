"""A prompt for LoRAs that were trained with a guidance token: an image's features in place of the last text token."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..freq_loss_plugin.guidance_token.features import CLIP_KEY, replace_last_token, stored_mean
from ..freq_loss_plugin.lora.metadata import LoraFileError
from .inputs import check_finite, node_output
from .lora_files import LoraFileNode, lora_names, read_header
from .schema import schema, widget

NO_LORA = "none"


class GuidanceToken(LoraFileNode):
    """Puts features into the last token of a prompt, as training does into that of a caption."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `freq_loss_plugin.guidance_token.features.replace_last_token`."""
        return schema(
            node_id="FreqLoss_GuidanceToken",
            display_name="Guidance Token",
            description="For LoRAs that were trained with guidance_token: replaces the last token of the prompt with "
            "the CLIP features of an image, or with the mean of the LoRA's training images.",
            search_aliases=["clip vision", "image prompt", "features", "real-fake"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The positive prompt, from a text encoder of SD1.x or "
                                      "SD2.x."),
                widget(io.Combo, "lora_name", options=[NO_LORA, *lora_names()], default=NO_LORA,
                       tooltip="The LoRA whose mean training features are used; none if an image is connected."),
                widget(io.Float, "strength", default=1.0, min=0.0, max=1.0, step=0.01,
                       tooltip="0 keeps the token, 1 replaces it as in training, values in between interpolate."),
                io.ClipVisionOutput.Input("image", optional=True,
                                          tooltip="An image's features, from CLIP Vision Encode with the CLIP that "
                                          "the LoRA was trained with (ViT-L/14 for SD1.x). Several images are "
                                          "averaged."),
            ],
            outputs=[
                io.Conditioning.Output("guided", display_name="conditioning", tooltip="The prompt with the token."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, conditioning: list[Any], lora_name: str, strength: float, image: Any = None) -> io.NodeOutput:
        """Replace the last token of every part of the conditioning."""
        if strength == 0:
            return node_output(cls, conditioning, text="not applied: the strength is 0")
        if image is None and lora_name == NO_LORA:
            raise ValueError(
                "there are no features: connect image (CLIP Vision Encode), or choose the LoRA whose mean is to be used"
            )
        if image is not None and lora_name != NO_LORA:
            raise ValueError(f"both image and lora_name = {lora_name} are given; disconnect image, or choose {NO_LORA}")
        features, source = _image_features(image) if image is not None else _training_mean(lora_name)
        guided = [[_replace_token(states, features, strength), dict(extras)] for states, extras in conditioning]
        return node_output(cls, guided, text=f"{source}, {features.shape[-1]} wide")


def _replace_token(states: Tensor, features: Tensor, strength: float) -> Tensor:
    if states.shape[-1] != features.shape[-1]:
        raise ValueError(
            f"the features are {features.shape[-1]} wide, and this prompt's tokens {states.shape[-1]}: expected the "
            "CLIP that the LoRA was trained with (768 for SD1.x, 1024 for SD2.x); SDXL and later models have no such "
            "token"
        )
    return replace_last_token(states, features, strength)


def _image_features(image: Any) -> tuple[Tensor, str]:
    """The mean over the images, shape (1, d), and a description."""
    embeds = image["image_embeds"]
    if not isinstance(embeds, Tensor) or embeds.ndim != 2:
        raise ValueError("image holds no projected features; use CLIP Vision Encode with a CLIP vision model")
    check_finite(embeds, "image")
    return embeds.float().mean(dim=0, keepdim=True), f"features of {len(embeds)} image{'s' * (len(embeds) > 1)}"


def _training_mean(lora_name: str) -> tuple[Tensor, str]:
    """The mean over the images that a LoRA was trained on, shape (1, d), and a description."""
    lora = read_header(lora_name)
    mean = stored_mean(lora.metadata)
    if mean is None:
        raise LoraFileError(
            f"{lora_name} has no mean of its training images in its metadata: it was not trained with guidance_token. "
            "Choose another, or connect an image"
        )
    clip = lora.metadata.get(CLIP_KEY, "an unnamed CLIP")
    return torch.atleast_2d(mean), f"mean of the training images by {clip}"
