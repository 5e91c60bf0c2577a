"""One trial: a LoRA trained on the embedded model in one arm, with one seed, on one style; then samples and measures.

The seed decides the training pictures, the beginning of the LoRA, the order of the pictures, their noise and
timesteps: two arms with the same seed see the same. The extra pass of the arms that have one (`unified`) takes its
timestep and its noise from the seed, too. Prompts, the noise of the samples and the held-out pictures are the same for
all.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import metrics
import numpy as np
import torch
from arms import Arm, Batch, all_arms, gradient_of
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor

from freq_loss_plugin import FreqLossConfig, frequency_matching_loss
from freq_loss_plugin.balance import GradientShare, with_gradient
from freq_loss_plugin.embedded import model_folder
from freq_loss_plugin.embedded.pictures import STYLES, Scene, draw, random_scene
from freq_loss_plugin.engine.comparison import Sampling, sample
from freq_loss_plugin.engine.dataset import Batches, Example
from freq_loss_plugin.engine.extraction import Clip
from freq_loss_plugin.engine.model import Model, load
from freq_loss_plugin.engine.settings import Settings
from freq_loss_plugin.step import shared_timesteps, stream_name, unified_timestep

TRAINING, PROMPTS, REAL = 24, 24, 256
BATCH, RANK, LEARNING_RATE, MAX_NORM = 4, 16, 4e-3, 1.0
SAMPLER_STEPS, GUIDANCE = 10, 3.0
TIMESTEPS = (100, 300, 500, 700, 900)
# Streams of scenes: of the training pictures (with the seed), of the prompts, of the pictures to compare with.
_TRAINING, _PROMPTS, _REAL = 31, 32, 33


@dataclass(frozen=True)
class Trial:
    """What is trained.

    Attributes:
        arm: a name in `arms.all_arms`.
        seed: see above.
        style: of the pictures.
        steps: optimizer steps (times the arm's length).
    """

    arm: str
    seed: int
    style: str
    steps: int

    @property
    def name(self) -> str:
        """For files."""
        words = "".join(letter if letter.isalnum() else "_" for letter in self.arm)
        return f"{self.style}-{words}-{self.seed}"


@dataclass(frozen=True)
class Reference:
    """What samples of a style are compared with: scenes of the prompts; real pictures, their latents and features."""

    scenes: list[Scene]
    prompts_latents: Tensor
    pictures: Tensor
    decoded: Tensor
    latents: Tensor
    features: Tensor


def run(trial: Trial, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Train, sample, measure; the result is also written to ``folder``, and read from there where it is already."""
    file = folder / f"{trial.name}.json"
    if file.is_file():
        found: dict[str, Any] = json.loads(file.read_text())
        if found["steps"] == trial.steps:
            return found
    start = time.perf_counter()
    arm, reference = all_arms()[trial.arm], reference_of(trial.style, folder, device)
    scenes, pictures = draw_scenes((_TRAINING, STYLES.index(trial.style), trial.seed), TRAINING, trial.style)
    model = new_model(trial.seed, folder, device)
    latents = encode(model, pictures)
    captions = [scene.caption(trial.style) for scene in scenes]
    shares = train(model, arm, latents, captions, trial)
    trained = time.perf_counter() - start
    prompts = [scene.caption(trial.style) for scene in reference.scenes]
    # Before sampling, which replaces the pipeline's scheduler.
    measured = held_out(model, reference, prompts)
    samples = sample(model, Sampling(prompts, steps=SAMPLER_STEPS, guidance=GUIDANCE), (128, 128))
    measured |= metrics.spectral_distances(samples, reference.decoded)
    measured |= metrics.sliced_wasserstein(encode(model, samples).cpu(), reference.latents)
    measured["kernel distance"] = metrics.kernel_distance(features_of(samples), reference.features)
    measured |= metrics.attributes(samples, reference.scenes, trial.style)
    measured["memorisation"] = metrics.memorisation(samples, pictures, reference.pictures)
    np.save(folder / f"{trial.name}.npy", (samples.numpy() * 255).round().astype(np.uint8))
    found = {
        "arm": trial.arm,
        "seed": trial.seed,
        "style": trial.style,
        "steps": trial.steps,
        "metrics": measured,
        "mean_share": float(np.mean(shares)) if shares else 0.0,
        "seconds": {"training": trained, "all": time.perf_counter() - start},
    }
    file.write_text(json.dumps(found, indent=1))
    return found


def train(model: Model, arm: Arm, latents: Tensor, captions: list[str], trial: Trial) -> list[float]:
    """Train the LoRA of ``model``; returns the ratio of the norms of both gradients, for each batch with a term."""
    parameters = model.trainable("lora_unet")
    length = trial.steps * arm.length
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=length)
    examples = [Example(Path(str(number)), caption, 1, (128, 128)) for number, caption in enumerate(captions)]
    batches = Batches(examples, BATCH, trial.seed)
    alphas = model.scheduler.alphas_cumprod.to(latents.device)
    keeper = GradientShare(arm.share or 1.0)
    window = FreqLossConfig()
    shares: list[float] = []

    def passed(chosen: list[int], timesteps: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        noise = torch.randn(latents[chosen].shape, generator=generator).to(latents.device)
        at = timesteps.to(latents.device)
        return model.predict(latents[chosen], at, noise, [captions[index] for index in chosen])

    def scaled(term_gradient: Tensor) -> Tensor:
        keeper.observe(term=term_gradient)
        gradient = term_gradient if arm.share is None else keeper.gain(term_gradient.device) * term_gradient
        shares.append(float(gradient.norm() / base_norm))
        return gradient

    for number in range(length):
        chosen = batches[number]
        generator = torch.Generator().manual_seed(hash_of("base", trial.seed, number))
        timesteps, shared = torch.randint(1000, (len(chosen),), generator=generator), None
        if arm.passes == "shared":
            name = f"{stream_name(trial.seed, number)}:shared"
            timesteps, shared = shared_timesteps(lambda n: torch.randint(1000, (n,)), len(chosen), window, name)
        prediction, noise = passed(chosen, timesteps, generator)
        base = (prediction - noise).square().mean()
        (base_gradient,) = torch.autograd.grad(base, prediction, retain_graph=True)
        base_norm = base_gradient.norm()
        keeper.observe(base=base_gradient)
        at: Tensor | float | None = {"own": timesteps.to(latents.device), "shared": shared, "unified": None}[arm.passes]
        if arm.term is not None and at is not None:
            value, gradient = gradient_of(arm.term, Batch(prediction, noise, latents[chosen], at, alphas))
            if arm.replaces:
                assert arm.share is not None
                base = (1 - arm.share) * base + with_gradient(prediction, value, arm.share * gradient)
            else:
                base = base + with_gradient(prediction, value, scaled(gradient))
        base.backward()
        if arm.term is not None and arm.passes == "unified":
            timestep = unified_timestep(window, trial.seed, number)
            generator = torch.Generator().manual_seed(hash_of("unified", trial.seed, number))
            prediction, noise = passed(chosen, torch.full((len(chosen),), timestep), generator)
            _, gradient = gradient_of(arm.term, Batch(prediction, noise, latents[chosen], timestep, alphas))
            prediction.backward(scaled(gradient))
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return shares


@torch.no_grad()
def held_out(model: Model, reference: Reference, prompts: list[str]) -> dict[str, float]:
    """Plain MSE on held-out pictures at fixed timesteps, and the band losses of batches of four."""
    clean, alphas = reference.prompts_latents.to(model.device), model.scheduler.alphas_cumprod
    losses, bands = [], []
    for timestep in TIMESTEPS:
        generator = torch.Generator().manual_seed(timestep)
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        at = torch.full((len(clean),), timestep, device=clean.device)
        prediction, target = model.predict(clean, at, noise, prompts)
        losses.append(float((prediction - target).square().mean()))
        if FreqLossConfig().min_timestep <= timestep < FreqLossConfig().max_timestep:
            bands += [
                band_losses(Batch(*group, timestep, alphas))
                for group in zip(prediction.split(BATCH), target.split(BATCH), clean.split(BATCH), strict=True)
            ]
    low, high = np.mean(bands, axis=0)
    each = {f"held-out loss {timestep}": loss for timestep, loss in zip(TIMESTEPS, losses, strict=True)}
    return {"held-out loss": float(np.mean(losses)), **each, "L_low": float(low), "L_high": float(high)}


def band_losses(batch: Batch) -> tuple[float, float]:
    """(L_low, L_high) of a batch at one timestep."""
    loss = frequency_matching_loss(
        batch.prediction,
        batch.target,
        prediction_type="epsilon",
        timesteps=batch.timesteps,
        alphas_cumprod=batch.alphas_cumprod,
        config=FreqLossConfig(),
    )
    return float(loss.low), float(loss.high)


def new_model(seed: int, folder: Path, device: str = "cpu") -> Model:
    """The embedded model with a fresh LoRA on its UNet."""
    settings = Settings(
        pretrained_model_name_or_path=str(model_folder()),
        train_data_dir=str(folder),
        resolution="128",
        network_dim=RANK,
        network_alpha=float(RANK),
        network_train_unet_only=True,
        learning_rate=LEARNING_RATE,
        seed=seed,
    )
    return load(settings, torch.device(device))


def draw_scenes(stream: tuple[int, ...], count: int, style: str) -> tuple[list[Scene], Tensor]:
    """Random scenes and their pictures, shape (count, 3, 128, 128), 0..1, as 8 bits hold them."""
    generator = np.random.default_rng(stream)
    scenes = [random_scene(generator) for _ in range(count)]
    pictures = np.stack([draw(scene, style) for scene in scenes])
    return scenes, torch.from_numpy((pictures * 255).round() / 255).permute(0, 3, 1, 2).contiguous().float()


@torch.no_grad()
def encode(model: Model, pictures: Tensor) -> Tensor:
    """The scaled latents of pictures, 0..1: means of the posterior; on the model's device."""
    vae = model.pipeline.vae
    means = [vae.encode(part.to(model.device) * 2 - 1).latent_dist.mean for part in pictures.split(8)]
    return torch.cat(means) * vae.config.scaling_factor


def reference_of(style: str, folder: Path, device: str = "cpu") -> Reference:
    """Made once for each style, and kept in ``folder``."""
    prompts, pictures_of_prompts = draw_scenes((_PROMPTS, STYLES.index(style)), PROMPTS, style)
    _, pictures = draw_scenes((_REAL, STYLES.index(style)), REAL, style)
    file = folder / f"reference-{style}.pt"
    if not file.is_file():
        model = new_model(0, folder, device)
        vae = model.pipeline.vae
        latents = encode(model, pictures)
        with torch.no_grad():
            decoded = torch.cat([vae.decode(part / vae.config.scaling_factor).sample for part in latents.split(8)])
        decoded = (decoded.cpu() / 2 + 0.5).clamp(0, 1)
        kept = {"latents": latents.cpu(), "decoded": decoded, "features": features_of(decoded)}
        torch.save({**kept, "prompts": encode(model, pictures_of_prompts).cpu()}, file)
    kept = torch.load(file)
    return Reference(prompts, kept["prompts"], pictures, kept["decoded"], kept["latents"], kept["features"])


@lru_cache(maxsize=1)
def _clip() -> Clip:
    return Clip(str(model_folder() / "image_encoder"), torch.device("cpu"))


def features_of(pictures: Tensor) -> Tensor:
    """CLIP features by the embedded image encoder, shape (n, d)."""
    images = [
        Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for picture in pictures
    ]
    return torch.cat([_clip()(images[first : first + 32]) for first in range(0, len(images), 32)])


def hash_of(name: str, seed: int, number: int) -> int:
    """A seed for a generator."""
    return int(np.random.SeedSequence([sum(name.encode()), seed, number]).generate_state(1)[0])
