"""What is known about the trainers of musubi-tuner: which there are, and which one is running."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from freq_loss_plugin.loss.latents import PredictionType

from .. import runs
from .host import DATASET_GROUPS


@dataclass(frozen=True)
class Family:
    """What one trainer class trains.

    Attributes:
        name: human-readable.
        network_module: the LoRA module of musubi-tuner that belongs to it.
        latent_cache: the module that encodes its images.
        undefined: why the loss is not defined for it, as the end of a sentence; empty where it is.
    """

    name: str
    network_module: str
    latent_cache: str
    undefined: str = ""

    def prediction_type(self, args: argparse.Namespace) -> PredictionType:  # noqa: ARG002 - as in sd-scripts
        """Velocity n - x0, or its negative (Z-Image, Ideogram): the loss is a square."""
        return "flow"


# A class that derives from another of these comes before it.
FAMILIES: dict[str, Family] = {
    "Flux2SelfFlowNetworkTrainer": Family(
        "FLUX.2 Self-Flow",
        "networks.lora_flux_2",
        "flux_2_cache_latents",
        "trains each token at a noise level of its own",
    ),
    "Flux2NetworkTrainer": Family("FLUX.2", "networks.lora_flux_2", "flux_2_cache_latents"),
    "FluxKontextNetworkTrainer": Family("FLUX.1 Kontext", "networks.lora_flux", "flux_kontext_cache_latents"),
    "QwenImageNetworkTrainer": Family("Qwen-Image", "networks.lora_qwen_image", "qwen_image_cache_latents"),
    "ZImageNetworkTrainer": Family("Z-Image", "networks.lora_zimage", "zimage_cache_latents"),
    "Krea2NetworkTrainer": Family("Krea 2", "networks.lora_krea2", "krea2_cache_latents"),
    "Ideogram4NetworkTrainer": Family("Ideogram 4", "networks.lora_ideogram4", "ideogram4_cache_latents"),
    "WanNetworkTrainer": Family("Wan", "networks.lora_wan", "wan_cache_latents"),
    "HunyuanVideoNetworkTrainer": Family("HunyuanVideo", "networks.lora", "cache_latents"),
    "HunyuanVideo15NetworkTrainer": Family("HunyuanVideo 1.5", "networks.lora_hv_1_5", "hv_1_5_cache_latents"),
    "FramePackNetworkTrainer": Family("FramePack", "networks.lora_framepack", "cache_latents"),
    "Kandinsky5NetworkTrainer": Family("Kandinsky 5", "networks.lora_kandinsky", "kandinsky5_cache_latents"),
    "HiDreamO1NetworkTrainer": Family(
        "HiDream-O1",
        "networks.lora_hidream_o1",
        "hidream_o1_cache_pixel",
        "predicts patches of pixels and has no latents",
    ),
    "MiniMaxH3NetworkTrainer": Family(
        "MiniMax-H3",
        "networks.lora_minimax_h3",
        "minimax_h3_cache_latents",
        "trains video and audio together, each at a noise level of its own",
    ),
}


class TrainingRun(runs.TrainingRun[Family]):
    """A run of musubi-tuner."""

    families = FAMILIES
    groups = DATASET_GROUPS
