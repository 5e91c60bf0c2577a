"""What a whole training step costs by mode: off, own, shared and unified, taking turns in one run.

    python benchmarks/training_step.py [--models toy sd15 sdxl] [--pixels 256] [--batch 4] [--steps 12]
                                       [--device cuda] [--dtype bf16] [--checkpointing]

A step is forward, backward and AdamW over a LoRA of rank 4, on the toy model's UNet or on one of SD1.5's or SDXL's size
with random weights (diffusers' `UNet2DConditionModel`); latents and text are random. Each round runs the modes in
another order. The table shows the median time of a step without the term, and that of each mode as a multiple of it;
`shared` is split into batches with the term and batches without.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, autocast

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.image_quality import restoration
from freq_loss_plugin.toy_model import model_folder
from freq_loss_plugin.training.passes import Pass
from freq_loss_plugin.training.term import FrequencyTerm
from freq_loss_plugin.training.timesteps import Draws

MODES: dict[str, dict[str, Any]] = {
    "off": {"dist_match": 0.0},
    "own": {"freq_loss_timesteps": "own"},
    "shared": {"freq_loss_timesteps": "shared"},
    "shared, ratio": {"freq_loss_timesteps": "shared", "freq_loss_gradient_ratio": 0.1},
    "unified": {"freq_loss_timesteps": "unified"},
    "balance by timestep": {"dist_match": 0.0, "freq_loss_balance": "timestep"},
    "balance by band": {"dist_match": 0.0, "freq_loss_balance": "band"},
    "image quality": {"dist_match": 0.0, "freq_loss_image_quality": "auto"},
}
# The least timestep of every other image in the last mode, whose latents are restored.
LEAST = 600
TOKENS = 77
# What differs from the defaults of UNet2DConditionModel.
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def draw(count: int) -> Tensor:
    """Timesteps of the base pass, shape (count,)."""
    return torch.randint(1000, (count,))


class Step:
    """One UNet with a LoRA, and a training step of it in each mode.

    Args:
        unet: its own weights are frozen.
        pixels: side of the images; the latents' is an eighth of it.
        batch: images per batch.
        device: where to compute.
        dtype: of the frozen weights, and of the computation by autocast.
    """

    def __init__(
        self, unet: UNet2DConditionModel, pixels: int, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        unet.requires_grad_(False).to(device, dtype).train()
        targets = r".*attentions\.\d+\..*(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)"
        inject_adapter_in_model(LoraConfig(r=4, target_modules=targets), unet)
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        self._unet, self.device, self._dtype = unet, device, dtype
        self._optimizer = torch.optim.AdamW(trained, lr=1e-6)
        self._latents = torch.randn(batch, 4, pixels // 8, pixels // 8, device=device)
        self._filter = restoration.fit(list(self._latents.cpu()), list(0.5 * self._latents.cpu()))
        self._text = torch.randn(batch, TOKENS, unet.config.cross_attention_dim, device=device)
        self._conditions = None
        if unet.config.addition_embed_type:
            width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            self._conditions = {"text_embeds": torch.randn(batch, width), "time_ids": torch.full((batch, 6), 256.0)}
            self._conditions = {name: value.to(device) for name, value in self._conditions.items()}
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        self._alphas_cumprod = torch.cumprod(1 - betas, dim=0).to(device)

    def run(self, term: FrequencyTerm, number: int) -> bool:
        """Train step ``number`` with a term; whether the term took part in it."""
        own = draw(len(self._latents))
        latents, least = self._latents, None
        if term.config.gated:
            least = LEAST * (torch.arange(len(own)) % 2)
            filtered = [self._filter.apply(each) if place % 2 else each for place, each in enumerate(latents)]
            latents = torch.stack(filtered)
        plan = term.plan(least)
        if plan.extra is not None:
            term.extra_pass(self._pass(latents, torch.full_like(own, plan.extra), plan.extra), Tensor.backward)
        if plan.chooses:
            own = term.choose(Draws(own, draw))
        base = self._pass(latents, own)
        balanced = term.balance(base)
        losses = (balanced.prediction - base.target).square().mean(dim=(1, 2, 3))
        losses = losses if balanced.weights is None else losses * balanced.weights
        term.join(base, losses.mean()).backward()
        term.settle(number)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return term.has_term

    def _pass(self, latents: Tensor, timesteps: Tensor, common: int | None = None) -> Pass:
        """The pass at ``timesteps``; ``common`` is their value where they are all the same."""
        timesteps, noise = timesteps.to(self.device), torch.randn_like(latents)
        alpha_bar = self._alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
        with autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            prediction = self._unet(noisy, timesteps, self._text, added_cond_kwargs=self._conditions).sample
        return Pass(prediction.float(), noise, timesteps if common is None else common, self._alphas_cumprod)


def _least(config: FreqLossConfig) -> dict[int, int] | None:
    return {0: 1, LEAST: 1} if config.gated else None


def measure(step: Step, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step by mode, after one round that does not count."""
    terms = {
        mode: FrequencyTerm(config := FreqLossConfig.from_mapping(options), "epsilon", seed=0, least=_least(config))
        for mode, options in MODES.items()
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for mode in random.Random(number).sample(list(MODES), len(MODES)):
            torch.manual_seed(number)
            wait(step)
            start = time.perf_counter()
            has_term = step.run(terms[mode], number)
            wait(step)
            name = f"{mode}, {'inside' if has_term else 'outside'}" if mode.startswith("shared") else mode
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(step: Step) -> None:
    """Wait for the device to finish."""
    if step.device.type == "cuda":
        torch.cuda.synchronize()


def make_unet(name: str, checkpointing: bool) -> UNet2DConditionModel:
    """The toy model's UNet, or one of a known size with random weights."""
    if name == "toy":
        unet = UNet2DConditionModel.from_pretrained(model_folder() / "unet")
    else:
        unet = UNet2DConditionModel(**SHAPES[name])
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("toy", *SHAPES), default=["toy", "sd15"])
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {hardware}, {options.dtype}\n")
    columns = [
        column
        for mode in list(MODES)[1:]
        for column in ([f"{mode}, inside", f"{mode}, outside"] if mode.startswith("shared") else [mode])
    ]
    print(f"| UNet | pixels | batch | off | {' | '.join(columns)} |\n{'|---' * (len(columns) + 4)}|")
    for name in options.models:
        unet = make_unet(name, options.checkpointing)
        seconds = measure(Step(unet, options.pixels, options.batch, device, DTYPES[options.dtype]), options.steps)
        off = statistics.median(seconds["off"])
        ratios = [f"×{statistics.median(seconds[mode]) / off:.3f}" if seconds[mode] else "none" for mode in columns]
        print(f"| {name} | {options.pixels} | {options.batch} | {off:.3f} s | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
