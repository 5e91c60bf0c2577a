"""Trains the embedded model from scratch, on drawn pictures alone: a latent diffusion model with SD1.5's topology.

    python assets/train_tiny_sd.py vae --steps 4000      the autoencoder, on crops of 64 pixels
    python assets/train_tiny_sd.py unet --steps 4700     the UNet and the text encoder, on its latents
    python assets/train_tiny_sd.py clip --steps 1500     the image encoder, on pictures and captions
    python assets/train_tiny_sd.py evaluate              PSNR, and attributes read off samples for held-out captions

The trainings write their products to assets/tiny_sd, in diffusers layout and fp16. They save their state every 100
steps below --work and go on from it when they are called again; the learning rate falls to 0 over --steps, so choose
that number once. A step depends on its number alone (pictures, noise and timesteps are drawn from it), so an
interrupted run ends where an uninterrupted one does. On two CPU cores a step of the VAE took 0.3 s, one of
the UNet 0.8 s; a GPU is used if there is one.

The styles `frames` and `weave` are not shown to any stage.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from freq_loss_plugin.embedded.attributes import measure
from freq_loss_plugin.embedded.pictures import (
    CAPTIONED_VALUES,
    COLOURS,
    SIZE,
    STYLES,
    Picture,
    Scene,
    draw,
    random_scene,
)
from freq_loss_plugin.engine.lora_file import write_whole

OUTPUT = Path(__file__).parent / "tiny_sd"
# What SD1.5 multiplies its latents by. Trainers and samplers hard-code it, so the autoencoder is made to fit it.
SCALING_FACTOR = 0.18215
TEXT_WIDTH = 64
SAVE_EVERY = 100
WARMUP = 20
# Channels per group of a group normalization, as many as in SD's autoencoder. With one, the mean of a channel, by which
# brightness and hue could be carried, would be lost at every layer.
GROUPS = 8
# Streams of pictures: what is trained on, and what no stage ever trains on.
TRAINING, HELD_OUT = 1, 2

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "steps_offset": 1,
}


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=GROUPS,
        sample_size=SIZE,
        scaling_factor=SCALING_FACTOR,
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=GROUPS,
    )


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP whose projection is as wide as the text encoder's hidden states, as ViT-L/14's is for SD1.5."""
    vision = CLIPVisionConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=16,
    )
    text = text_config(tokenizer)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT_WIDTH))


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte-pair encoding, trained until every word of the captions is one token; other text is spelt out."""
    merges = _byte_pair_merges(_words_of_the_captions())
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = characters + [f"{character}</w>" for character in characters]
    tokens += ["".join(merge) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77, pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _words_of_the_captions() -> list[str]:
    generator = np.random.default_rng(0)
    captions = [random_scene(generator).caption() for _ in range(2000)] + [f"{style} style" for style in STYLES]
    return sorted({word for caption in captions for word in caption.split()})


def _byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Join the most frequent pair of pieces in all words, again and again, until each word is one piece."""
    merges = []
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in words]
    while pairs := Counter(pair for pieces in spellings for pair in pairwise(pieces)):
        first, second = pair = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(pair)
        for pieces in spellings:
            for i in range(len(pieces) - 2, -1, -1):
                if pieces[i : i + 2] == [first, second]:
                    pieces[i : i + 2] = [first + second]
    return merges


def random_picture(generator: np.random.Generator) -> Picture:
    """A scene of the base style; every other time with colours exchanged, turned, and partly another scene.

    Three times in five a few bars in bright colours lie over it, so that colour is no rare thing in a crop.
    """
    picture = draw(random_scene(generator))
    if generator.random() < 0.5:
        other = draw(random_scene(generator))
        tilt = generator.normal(size=2)
        down, right = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
        edge = (down * tilt[0] + right * tilt[1] + 0.1 * generator.normal() > 0)[..., None]
        mixed = np.where(edge, picture, other[::-1])[..., generator.permutation(3)]
        picture = np.ascontiguousarray(np.rot90(mixed, generator.integers(4)))
    if generator.random() < 0.6:
        for _ in range(generator.integers(1, 4)):
            colour = generator.permutation(list(COLOURS.values())[generator.integers(len(COLOURS))])
            height, width = np.exp(generator.uniform(math.log(6), math.log(90), size=2)).astype(int)
            top, left = generator.integers(-height // 2, SIZE), generator.integers(-width // 2, SIZE)
            bar = np.s_[max(top, 0) : top + height, max(left, 0) : left + width]
            picture[bar] = colour * generator.uniform(0.6, 1)
    return picture


def to_tensor(pictures: list[Picture]) -> Tensor:
    """(B, 3, H, W) in -1..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2 - 1


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is turned into the nearest orthogonal matrix (Jordan et al. 2024, "Muon").

    torch.optim.Muon takes two-dimensional weights only; a convolution's is seen here as (out, in·height·width). With
    the factor 0.2·sqrt(max(rows, columns)) a step is as large as one of AdamW's, so both share a learning rate. After
    250 steps of the autoencoder (an earlier one, single runs) it stood at 18.1 dB where AdamW stood at 14.4.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step for every parameter."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = orthogonalise(parameter.grad.lerp(average, group["momentum"]).flatten(1))
                size = 0.2 * max(direction.shape) ** 0.5
                parameter.add_(direction.view_as(parameter), alpha=-group["lr"] * size)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Singular values near 1 by five steps of the Newton-Schulz iteration, with Muon's published coefficients."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T) / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.T


class Stage:
    """A resumable training: parameters, Muon and AdamW, a learning rate that falls to 0, and a state file."""

    def __init__(self, file: Path, modules: dict[str, nn.Module], steps: int, rate: float) -> None:
        self.file, self.modules, self.steps, self.step, self.rate = file, modules, steps, 0, rate
        tables = {
            id(part.weight)
            for module in modules.values()
            for part in module.modules()
            if isinstance(part, nn.Embedding)
        }
        parameters = [parameter for module in modules.values() for parameter in module.parameters()]
        matrices = [parameter for parameter in parameters if parameter.ndim >= 2 and id(parameter) not in tables]
        others = [parameter for parameter in parameters if parameter.ndim < 2 or id(parameter) in tables]
        self.optimizers = [Muon(matrices, rate), torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=0)]
        self.average = {name: [p.detach().clone() for p in module.parameters()] for name, module in modules.items()}
        if file.exists():
            self._load()

    def run(self, loss_of_step: Callable[[int], dict[str, Tensor]], decay: float) -> None:
        """Train up to ``steps``; ``loss_of_step`` returns the parts of the loss, ``decay`` is that of the average."""
        start, first = time.time(), self.step
        while self.step < self.steps:
            torch.manual_seed(self.step)
            parts = loss_of_step(self.step)
            sum(parts.values()).backward()
            groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
            torch.nn.utils.clip_grad_norm_([parameter for group in groups for parameter in group["params"]], 1.0)
            for group in groups:
                group["lr"] = self.rate * min(1, (self.step + 1) / WARMUP) * (1 - self.step / self.steps)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
            self._update_average(min(decay, (1 + self.step) / (10 + self.step)))
            if self.step % SAVE_EVERY == 0 or self.step == self.steps:
                self.save()
                pace = (time.time() - start) / (self.step - first)
                told = ", ".join(f"{name} {part.item():.4f}" for name, part in parts.items())
                print(f"step {self.step}/{self.steps}  {told}  {pace:.2f} s a step", flush=True)

    def save(self) -> None:
        """Write the state, whole or not at all."""
        state = {
            "step": self.step,
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        write_whole(self.file, lambda part: torch.save(state, part))

    def use_average(self) -> None:
        """Put the average of the weights into the modules, for use and for export."""
        for name, module in self.modules.items():
            for parameter, average in zip(module.parameters(), self.average[name], strict=True):
                parameter.data.copy_(average)

    def _update_average(self, decay: float) -> None:
        for name, module in self.modules.items():
            torch._foreach_lerp_(self.average[name], [p.detach() for p in module.parameters()], 1 - decay)

    def _load(self) -> None:
        state = torch.load(self.file, map_location=next(iter(self.average.values()))[0].device)
        self.step, self.average = state["step"], state["average"]
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        print(f"going on from step {self.step} of {self.file}", flush=True)


# Orthonormal axes of brightness and of two opponent colours. Errors in colour count for more: most of a picture is
# grey, and an autoencoder that is free to choose spends all four channels on brightness.
OPPONENT = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]])
OPPONENT = OPPONENT / OPPONENT.norm(dim=1, keepdim=True) * torch.tensor([[1.0], [5.0], [5.0]])


def train_vae(options: argparse.Namespace, device: torch.device) -> None:
    torch.manual_seed(0)
    vae = make_vae().to(device)
    with torch.no_grad():  # begin with little noise: standard deviations of exp(-3)
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -6
    stage = Stage(options.work / "vae.pt", {"vae": vae}, options.steps, 5e-3)

    def loss_of_step(step: int) -> dict[str, Tensor]:
        generator = np.random.default_rng((TRAINING, step))
        crops = []
        for _ in range(4):
            picture = random_picture(generator)
            top, left = generator.integers(0, SIZE - 64 + 1, size=2)
            crops.append(picture[top : top + 64, left : left + 64])
        pixels = to_tensor(crops).to(device)
        posterior = vae.encode(pixels).latent_dist
        error = torch.einsum("dc,bchw->bdhw", OPPONENT.to(device), vae.decode(posterior.sample()).sample - pixels)
        # At first it only keeps the latents from drifting (they are rescaled to unit variance afterwards); then it
        # makes them noisier, so that the decoder forgives the small errors of a sampler.
        kl_weight = 1e-6 if step < 0.7 * options.steps else 1e-5
        return {"l1": error.abs().mean(), "l2": error.square().mean(), "kl": kl_weight * posterior.kl().mean()}

    stage.run(loss_of_step, decay=0.995)
    stage.use_average()
    vae.eval()
    fit_scaling_factor(vae, device)
    print(f"held-out PSNR {reconstruction_psnr(vae, device):.2f} dB")
    vae.half().save_pretrained(OUTPUT / "vae")


@torch.no_grad()
def reconstruction_psnr(vae: nn.Module, device: torch.device, count: int = 64) -> float:
    """Mean PSNR in dB over whole held-out pictures of the base style, coded with the mean of the posterior."""
    generator = np.random.default_rng(HELD_OUT)
    found = []
    for _ in range(count // 8):
        pixels = to_tensor([draw(random_scene(generator)) for _ in range(8)]).to(device)
        restored = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        mse = ((restored - pixels) / 2).square().mean(dim=(1, 2, 3))
        found += (-10 * mse.log10()).tolist()
    return sum(found) / len(found)


@torch.no_grad()
def fit_scaling_factor(vae: AutoencoderKL, device: torch.device) -> None:
    """Rescale the latents, inside the autoencoder, so that SD's fixed factor gives them unit variance.

    The last layer of the encoder puts out (mean, log variance): the means are multiplied by r, the log variances gain
    2·ln r; the first layer of the decoder divides by r. Reconstructions stay the same.
    """
    generator = np.random.default_rng(TRAINING)
    pixels = to_tensor([draw(random_scene(generator)) for _ in range(64)]).to(device)
    ratio = (1 / (SCALING_FACTOR * vae.encode(pixels).latent_dist.sample().std())).item()
    channels = vae.config.latent_channels
    vae.quant_conv.weight[:channels] *= ratio
    vae.quant_conv.bias[:channels] *= ratio
    vae.quant_conv.bias[channels:] += 2 * math.log(ratio)
    vae.post_quant_conv.weight /= ratio


def load_vae(device: torch.device) -> AutoencoderKL:
    """The product of the stage vae, in float32."""
    if not (OUTPUT / "vae").is_dir():
        raise SystemExit(f"no autoencoder in {OUTPUT / 'vae'}: run the stage vae first")
    return AutoencoderKL.from_pretrained(OUTPUT / "vae", torch_dtype=torch.float32).to(device).requires_grad_(False)


def tokens(tokenizer: CLIPTokenizer, captions: list[str], device: torch.device) -> Tensor:
    return tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids.to(
        device
    )


def train_unet(options: argparse.Namespace, device: torch.device) -> None:
    vae = load_vae(device)
    tokenizer = make_tokenizer(options.work / "tokenizer")
    torch.manual_seed(1)
    unet, text_encoder = make_unet().to(device), CLIPTextModel(text_config(tokenizer)).to(device)
    stage = Stage(options.work / "unet.pt", {"unet": unet, "text_encoder": text_encoder}, options.steps, 6e-3)
    latents, captions = encoded_pictures(vae, options.pictures, options.work, device)
    scheduler = DDPMScheduler(**SCHEDULE)

    def loss_of_step(step: int) -> dict[str, Tensor]:
        generator = np.random.default_rng((TRAINING, step, 3))
        chosen = generator.integers(len(captions), size=16)
        mean, deviation = latents[chosen].to(device).chunk(2, dim=1)
        clean = SCALING_FACTOR * (mean + deviation * torch.randn_like(mean))
        # Even at the last timestep of SD's schedule some of the picture is left, enough to read brightness and position
        # off it; a model that learns to do so ignores those words and takes both from the noise when it samples. Hence
        # noise of low frequency, which hides them, and more of the high timesteps, at which only the caption tells.
        noise = torch.randn_like(clean)
        noise = noise + 0.15 * torch.randn(*noise.shape[:2], 1, 1, device=device)
        blobs = torch.randn(*noise.shape[:2], 4, 4, device=device)
        noise = noise + 0.4 * F.interpolate(blobs, noise.shape[2:], mode="bilinear")
        timesteps = torch.from_numpy(np.concatenate((spread(generator, 0, 1000), spread(generator, 850, 1000))))
        timesteps = timesteps.to(device)
        # One caption in ten is empty, for classifier-free guidance.
        words = [captions[i] if generator.random() > 0.1 else "" for i in chosen]
        states = text_encoder(tokens(tokenizer, words, device))[0]
        predicted = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, states).sample
        error = (predicted - noise).square().mean(dim=(1, 2, 3))
        # 0.3/SNR where that is above 1: there an error of the noise is a small image of a large error of the picture.
        signal = scheduler.alphas_cumprod.to(device)[timesteps]
        weight = (0.3 * (1 - signal) / signal).clamp(min=1)
        return {"mse": (weight * error).mean()}

    stage.run(loss_of_step, decay=0.998)
    stage.use_average()
    save_pipeline(vae, unet, text_encoder, tokenizer)


def train_clip(options: argparse.Namespace, device: torch.device) -> None:
    """CLIP's contrastive training (Radford et al. 2021) from scratch; only the image encoder is kept."""
    tokenizer = make_tokenizer(options.work / "tokenizer")
    torch.manual_seed(2)
    clip = make_clip(tokenizer).to(device)
    stage = Stage(options.work / "clip.pt", {"clip": clip}, options.steps, 4e-3)
    generator = np.random.default_rng((TRAINING, 0, 6))
    scenes = [random_scene(generator) for _ in range(options.pictures)]
    pictures = torch.stack([torch.from_numpy((draw(scene) * 255).round().astype(np.uint8)) for scene in scenes])
    captions = [scene.caption() for scene in scenes]
    batch = min(128, len(captions))

    def loss_of_step(step: int) -> dict[str, Tensor]:
        chosen = np.random.default_rng((TRAINING, step, 7)).choice(len(captions), size=batch, replace=False)
        pixels = pictures[chosen].to(device).permute(0, 3, 1, 2) / 127.5 - 1
        ids = tokens(tokenizer, [captions[i] for i in chosen], device)
        return {"contrastive": clip(input_ids=ids, pixel_values=pixels, return_loss=True).loss}

    stage.run(loss_of_step, decay=0.995)
    stage.use_average()
    clip.eval()
    print_zero_shot(clip, tokenizer, device, options.samples)
    config = CLIPVisionConfig.from_dict(clip.config.vision_config.to_dict())
    kept = CLIPVisionModelWithProjection(config)
    kept.load_state_dict({k: v for k, v in clip.state_dict().items() if k in kept.state_dict()})
    folder = OUTPUT / "image_encoder"
    kept.half().save_pretrained(folder, safe_serialization=True)
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=SIZE, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


@torch.no_grad()
def print_zero_shot(clip: CLIPModel, tokenizer: CLIPTokenizer, device: torch.device, count: int) -> None:
    """How often, of captions that differ in one attribute only, the right one is nearest to a held-out picture."""
    generator = np.random.default_rng((HELD_OUT, 8))
    scenes = [random_scene(generator) for _ in range(count)]
    pixels = to_tensor([draw(scene) for scene in scenes]).to(device)
    for name, values in CAPTIONED_VALUES.items():
        right = 0
        for scene, picture in zip(scenes, pixels, strict=True):
            captions = [replace(scene, **{name: value}).caption() for value in values]
            ids = tokens(tokenizer, captions, device)
            likeness = clip(input_ids=ids, pixel_values=picture[None]).logits_per_image
            right += values[int(likeness.argmax())] == getattr(scene, name)
        print(f"{name:<12} {right / count:.1%} of {count} pictures (chance {1 / len(values):.0%})")


def spread(generator: np.random.Generator, first: int, end: int, count: int = 8) -> np.ndarray:
    """``count`` timesteps, one out of each part of the range: uniform, with less variance from step to step."""
    return (first + (np.arange(count) + generator.random(count)) / count * (end - first)).astype(np.int64)


@torch.no_grad()
def encoded_pictures(vae: AutoencoderKL, count: int, work: Path, device: torch.device) -> tuple[Tensor, list[str]]:
    """Means and deviations of the latents of ``count`` base pictures, and their captions; coded once, then read."""
    generator = np.random.default_rng((TRAINING, 0, 4))
    scenes = [random_scene(generator) for _ in range(count)]
    captions = [scene.caption() for scene in scenes]
    weights = sum(parameter.double().abs().sum().item() for parameter in vae.parameters())
    file = work / f"latents_{count}_{weights:.6f}.pt"
    if file.exists():
        return torch.load(file), captions
    parts = []
    for batch in _batches(scenes, 16):
        posterior = vae.encode(to_tensor([draw(scene) for scene in batch]).to(device)).latent_dist
        parts.append(torch.cat((posterior.mean, posterior.std), dim=1).cpu())
    latents = torch.cat(parts)
    torch.save(latents, file)
    return latents, captions


def _batches(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def save_pipeline(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(OUTPUT, safe_serialization=True)
    for file in OUTPUT.rglob("*.json"):  # where a part was loaded from is nobody's business
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    megabytes = sum(file.stat().st_size for file in OUTPUT.rglob("*") if file.is_file()) / 1e6
    print(f"wrote {OUTPUT}: {megabytes:.1f} MB")


def load_pipeline(device: torch.device) -> StableDiffusionPipeline:
    if not (OUTPUT / "model_index.json").is_file():
        raise SystemExit(f"no model in {OUTPUT}: run the stages vae and unet first")
    return StableDiffusionPipeline.from_pretrained(OUTPUT, torch_dtype=torch.float32).to(device)


def evaluate(options: argparse.Namespace, device: torch.device) -> None:
    """Attributes read off samples for held-out captions, beside the chance of guessing them; and a sheet of samples."""
    pipeline = load_pipeline(device)
    print(f"held-out PSNR {reconstruction_psnr(pipeline.vae, device):.2f} dB")
    pipeline.set_progress_bar_config(disable=True)
    generator = np.random.default_rng((HELD_OUT, 5))
    scenes = [random_scene(generator) for _ in range(options.samples)]
    sampled: list[Picture] = []
    for batch in _batches(scenes, 16):
        noise = torch.Generator().manual_seed(int(generator.integers(2**31)))
        sampled += list(
            pipeline(
                [scene.caption() for scene in batch],
                height=SIZE,
                width=SIZE,
                num_inference_steps=30,
                guidance_scale=3.0,
                generator=noise,
                output_type="np",
            ).images
        )
    found = [measure(picture) for picture in sampled]
    for name, values in CAPTIONED_VALUES.items():
        right = sum(each[name] == getattr(scene, name) for each, scene in zip(found, scenes, strict=True))
        print(f"{name:<12} {right / len(scenes):.1%} of {len(scenes)} samples (chance {1 / len(values):.0%})")
    write_sheet(scenes[:16], sampled[:16])


def write_sheet(scenes: list[Scene], sampled: list[Picture]) -> None:
    """Drawn pictures above, and below each what the model samples for its caption, eight to a row."""
    rows = []
    for i in range(0, len(scenes), 8):
        rows += [[draw(scene) for scene in scenes[i : i + 8]], sampled[i : i + 8]]
    width = SIZE * max(len(row) for row in rows)
    sheet = np.ones((SIZE * len(rows), width, 3))
    for number, row in enumerate(rows):
        strip = np.concatenate(row, axis=1)
        sheet[number * SIZE : (number + 1) * SIZE, : strip.shape[1]] = strip
    Image.fromarray((sheet * 255).round().astype(np.uint8)).save(OUTPUT / "samples.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = {"vae": train_vae, "unet": train_unet, "clip": train_clip, "evaluate": evaluate}
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--steps", type=int, help="4000, 4700 and 1500 where left out")
    parser.add_argument("--pictures", type=int, default=6000, help="drawn pictures for the stages unet and clip")
    parser.add_argument("--samples", type=int, default=128, help="pictures to evaluate on")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "freq_loss_plugin" / "tiny_sd")
    options = parser.parse_args()
    options.steps = options.steps or {"vae": 4000, "unet": 4700, "clip": 1500}.get(options.stage)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stages[options.stage](options, device)


if __name__ == "__main__":
    main()
