"""What a whole training step costs by mode: off, own, shared and unified, taking turns in one run.

    python benchmarks/training_step.py [--models embedded sd15 sdxl] [--pixels 256] [--batch 4] [--steps 12]
                                       [--device cuda] [--dtype bf16] [--checkpointing]

A step is forward, backward and AdamW over a LoRA of rank 4, on the embedded UNet or on one of SD1.5's or SDXL's shape
with random weights (diffusers' `UNet2DConditionModel`); latents and text are random. Every mode sees the same batches,
and each round runs the modes in another order. Shown are medians of the time of a step, and of each mode over `off`;
`shared` is split into the batches that have the term and those that do not.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections import defaultdict

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, autocast

from freq_loss_plugin import FreqLossConfig, frequency_matching_loss
from freq_loss_plugin.embedded import model_folder
from freq_loss_plugin.step import shared_timesteps, stream_name, unified_timestep

MODES = ("off", "own", "shared", "unified")
TOKENS = 77
# What differs from the defaults of UNet2DConditionModel.
SHAPES = {
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


class Step:
    """One UNet with a LoRA, and a training step of it in each mode.

    Args:
        unet: its own weights are frozen.
        pixels: side of the pictures; the latents' is an eighth of it.
        batch: pictures per batch.
        device: where to compute.
        dtype: of the frozen weights, and of the computation by autocast.
    """

    def __init__(
        self, unet: UNet2DConditionModel, pixels: int, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        unet.requires_grad_(False).to(device, dtype).train()
        targets = r".*attentions\.\d+\..*(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)"
        inject_adapter_in_model(LoraConfig(r=4, target_modules=targets), unet)
        trained = [each for each in unet.parameters() if each.requires_grad]
        for each in trained:
            each.data = each.data.float()
        self._unet, self.device, self._dtype = unet, device, dtype
        self._optimizer = torch.optim.AdamW(trained, lr=1e-6)
        self._latents = torch.randn(batch, 4, pixels // 8, pixels // 8, device=device)
        self._text = torch.randn(batch, TOKENS, unet.config.cross_attention_dim, device=device)
        self._conditions = None
        if unet.config.addition_embed_type:
            width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            self._conditions = {"text_embeds": torch.randn(batch, width), "time_ids": torch.full((batch, 6), 256.0)}
            self._conditions = {name: value.to(device) for name, value in self._conditions.items()}
        alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)
        self._schedule, self._schedule_on_device = alphas, alphas.to(device)

    def run(self, mode: str, config: FreqLossConfig, number: int) -> bool:
        """Step ``number`` in one of `MODES`; whether the frequency term took part in it."""
        timesteps, shared = torch.randint(1000, (len(self._latents),)).to(self.device), None
        if mode == "shared":
            name = f"{stream_name(0, number)}:shared"
            timesteps, shared = shared_timesteps(lambda n: torch.randint(1000, (n,)), len(timesteps), config, name)
            timesteps = timesteps.to(self.device)
        if mode == "unified":
            timestep = unified_timestep(config, 0, number)
            self._term(*self._pass(torch.full_like(timesteps, timestep)), timestep, config).backward()
        prediction, noise = self._pass(timesteps)
        loss = F.mse_loss(prediction, noise)
        if mode == "own" or shared is not None:
            loss = loss + self._term(prediction, noise, timesteps if shared is None else shared, config)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return mode in ("own", "unified") or shared is not None

    def _pass(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(self._latents)
        alpha_bar = self._schedule_on_device[timesteps].view(-1, 1, 1, 1)
        noisy = alpha_bar.sqrt() * self._latents + (1 - alpha_bar).sqrt() * noise
        with autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            predicted = self._unet(noisy, timesteps, self._text, added_cond_kwargs=self._conditions).sample
        return predicted.float(), noise

    def _term(self, prediction: Tensor, noise: Tensor, timesteps: Tensor | float, config: FreqLossConfig) -> Tensor:
        schedule = self._schedule_on_device if isinstance(timesteps, Tensor) else self._schedule
        return frequency_matching_loss(
            prediction,
            noise,
            prediction_type="epsilon",
            timesteps=timesteps,
            alphas_cumprod=schedule,
            config=config,
        ).total


def measure(step: Step, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step by mode, after one round that does not count."""
    configs = {mode: FreqLossConfig.from_mapping({"freq_loss_timesteps": mode}) for mode in MODES[1:]}
    configs["off"] = FreqLossConfig(dist_match=0.0)
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for mode in random.Random(number).sample(MODES, len(MODES)):
            torch.manual_seed(number)
            wait(step)
            start = time.perf_counter()
            has_term = step.run(mode, configs[mode], number)
            wait(step)
            name = mode if mode != "shared" else f"shared, {'inside' if has_term else 'outside'}"
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(step: Step) -> None:
    """Until the device is done."""
    if step.device.type == "cuda":
        torch.cuda.synchronize()


def make(name: str) -> UNet2DConditionModel:
    """The embedded UNet, or one of a known shape with random weights."""
    if name == "embedded":
        return UNet2DConditionModel.from_pretrained(model_folder() / "unet")
    return UNet2DConditionModel(**SHAPES[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("embedded", *SHAPES), default=["embedded", "sd15"])
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {where}, {options.dtype}\n")
    columns = ("own", "shared, inside", "shared, outside", "unified")
    print(f"| UNet | pixels | batch | off | {' | '.join(columns)} |\n{'|---' * (len(columns) + 4)}|")
    for name in options.models:
        unet = make(name)
        if options.checkpointing:
            unet.enable_gradient_checkpointing()
        seconds = measure(Step(unet, options.pixels, options.batch, device, DTYPES[options.dtype]), options.steps)
        off = statistics.median(seconds["off"])
        ratios = [f"×{statistics.median(seconds[each]) / off:.3f}" if seconds[each] else "none" for each in columns]
        print(f"| {name} | {options.pixels} | {options.batch} | {off:.3f} s | {' | '.join(ratios)} |", flush=True)
        del unet


if __name__ == "__main__":
    main()
