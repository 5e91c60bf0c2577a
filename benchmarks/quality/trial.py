"""One trial: a LoRA trained on the toy model in one arm, with one seed, on one style; then its samples and metrics.

The seed decides the training images, the initial weights of the LoRA, the order of the images, their noise and
timesteps: two arms with the same seed see the same batches. The prompts, the noise of the samples and the validation
images are the same for all trials of a style.
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
from arm_training import BATCH, LEARNING_RATE, ArmTraining
from arms import all_arms
from more_itertools import chunked
from PIL import Image
from torch import Tensor

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.engine.comparison import Sampling, sample
from freq_loss_plugin.engine.model import Model, load
from freq_loss_plugin.engine.settings import Settings
from freq_loss_plugin.guidance_token.extract import Clip
from freq_loss_plugin.toy_model import model_folder
from freq_loss_plugin.toy_model.scenes import STYLES, Scene, draw, random_scene
from freq_loss_plugin.training.passes import Pass
from freq_loss_plugin.training.term import FrequencyTerm

TRAINING, PROMPTS, REAL = 24, 24, 256
RANK = 16
SAMPLER_STEPS, GUIDANCE = 10, 3.0
TIMESTEPS = (100, 300, 500, 700, 900)
# Streams of scenes: of the training images (with the seed), of the prompts, of the images to compare with.
_TRAINING, _PROMPTS, _REAL = 31, 32, 33


@dataclass(frozen=True)
class Trial:
    """What is trained.

    Attributes:
        arm: a name in `arms.all_arms`.
        seed: see above.
        style: of the images.
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
    """What samples of a style are compared with.

    Attributes:
        scenes: of the prompts.
        prompts_latents: latents of these scenes, shape (n, 4, 16, 16).
        images: real images of the style, shape (m, 3, 128, 128), 0..1.
        decoded: the same after the VAE.
        latents: theirs, shape (m, 4, 16, 16).
        features: CLIP features of ``decoded``, shape (m, d).
    """

    scenes: list[Scene]
    prompts_latents: Tensor
    images: Tensor
    decoded: Tensor
    latents: Tensor
    features: Tensor


def run(trial: Trial, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Train, sample, measure; the result is also written to ``folder``, and read from there if it exists."""
    file = folder / f"{trial.name}.json"
    if file.is_file():
        kept: dict[str, Any] = json.loads(file.read_text())
        if kept["steps"] == trial.steps:
            return kept
    start = time.perf_counter()
    arm, reference = all_arms()[trial.arm], reference_of(trial.style, folder, device)
    scenes, images = draw_scenes((_TRAINING, STYLES.index(trial.style), trial.seed), TRAINING, trial.style)
    model = new_model(trial.seed, folder, device)
    captions = [scene.caption(trial.style) for scene in scenes]
    training = ArmTraining(model, arm, encode(model, images), captions, seed=trial.seed, steps=trial.steps)
    ratios = training.run()
    trained = time.perf_counter() - start
    measured, samples = measure(model, reference, images, trial.style)
    np.save(folder / f"{trial.name}.npy", (samples.numpy() * 255).round().astype(np.uint8))
    result = {
        "arm": trial.arm,
        "seed": trial.seed,
        "style": trial.style,
        "steps": trial.steps,
        "metrics": measured,
        "gradient_ratio": float(np.mean(ratios)) if ratios else 0.0,
        "seconds": {"training": trained, "all": time.perf_counter() - start},
    }
    file.write_text(json.dumps(result, indent=1))
    return result


def measure(model: Model, reference: Reference, images: Tensor, style: str) -> tuple[dict[str, float], Tensor]:
    """The metrics of a trained model, and its samples, shape (n, 3, 128, 128), 0..1.

    Args:
        model: the base model with the LoRA.
        reference: of the style.
        images: what the LoRA was trained on, shape (n, 3, 128, 128), 0..1.
        style: of the images.
    """
    prompts = [scene.caption(style) for scene in reference.scenes]
    # Before sampling, which replaces the pipeline's scheduler.
    measured = validate(model, reference, prompts)
    samples = sample(model, Sampling(prompts, steps=SAMPLER_STEPS, guidance=GUIDANCE), (128, 128))
    measured |= metrics.spectral_distances(samples, reference.decoded)
    measured |= metrics.sliced_wasserstein(encode(model, samples).cpu(), reference.latents)
    measured["kernel distance"] = metrics.kernel_distance(clip_features(samples), reference.features)
    measured |= metrics.attributes(samples, reference.scenes, style)
    measured["memorization"] = metrics.memorization(samples, images, reference.images)
    return measured, samples


@torch.no_grad()
def validate(model: Model, reference: Reference, prompts: list[str]) -> dict[str, float]:
    """Plain MSE on validation images at fixed timesteps, and the band losses of batches of four."""
    clean, alphas = reference.prompts_latents.to(model.device), model.scheduler.alphas_cumprod
    term = FrequencyTerm(FreqLossConfig(), "epsilon", seed=None)
    losses, bands = [], []
    for timestep in TIMESTEPS:
        generator = torch.Generator().manual_seed(timestep)
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        at = torch.full((len(clean),), timestep, device=clean.device)
        prediction, target = model.predict(clean, at, noise, prompts)
        losses.append(float((prediction - target).square().mean()))
        if term.config.min_timestep <= timestep < term.config.max_timestep:
            batches = zip(prediction.split(BATCH), target.split(BATCH), strict=True)
            evaluated = [term.evaluate(Pass(*batch, timestep, alphas)) for batch in batches]
            bands += [(float(loss.low), float(loss.high)) for loss in evaluated]
    low, high = np.mean(bands, axis=0)
    by_timestep = {f"validation loss {timestep}": loss for timestep, loss in zip(TIMESTEPS, losses, strict=True)}
    return {"validation loss": float(np.mean(losses)), **by_timestep, "L_low": float(low), "L_high": float(high)}


def new_model(seed: int, folder: Path, device: str = "cpu") -> Model:
    """The toy model with a new LoRA on its UNet."""
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
    """Random scenes and their images, shape (count, 3, 128, 128), 0..1, as 8 bits hold them."""
    generator = np.random.default_rng(stream)
    scenes = [random_scene(generator) for _ in range(count)]
    images = np.stack([draw(scene, style) for scene in scenes])
    return scenes, torch.from_numpy((images * 255).round() / 255).permute(0, 3, 1, 2).contiguous().float()


@torch.no_grad()
def encode(model: Model, images: Tensor) -> Tensor:
    """The scaled latents of images, 0..1: means of the posterior; on the model's device."""
    vae = model.pipeline.vae
    means = [vae.encode(part.to(model.device) * 2 - 1).latent_dist.mean for part in images.split(8)]
    return torch.cat(means) * vae.config.scaling_factor


def reference_of(style: str, folder: Path, device: str = "cpu") -> Reference:
    """Made once for each style, and kept in ``folder``."""
    prompts, images_of_prompts = draw_scenes((_PROMPTS, STYLES.index(style)), PROMPTS, style)
    _, images = draw_scenes((_REAL, STYLES.index(style)), REAL, style)
    file = folder / f"reference-{style}.pt"
    if not file.is_file():
        model = new_model(0, folder, device)
        vae = model.pipeline.vae
        latents = encode(model, images)
        with torch.no_grad():
            decoded = torch.cat([vae.decode(part / vae.config.scaling_factor).sample for part in latents.split(8)])
        decoded = (decoded.cpu() / 2 + 0.5).clamp(0, 1)
        kept = {"latents": latents.cpu(), "decoded": decoded, "features": clip_features(decoded)}
        torch.save({**kept, "prompts": encode(model, images_of_prompts).cpu()}, file)
    kept = torch.load(file)
    return Reference(prompts, kept["prompts"], images, kept["decoded"], kept["latents"], kept["features"])


@lru_cache(maxsize=1)
def _clip() -> Clip:
    return Clip(str(model_folder() / "image_encoder"), torch.device("cpu"))


def clip_features(images: Tensor) -> Tensor:
    """CLIP features of images, shape (n, 3, H, W), 0..1, by the toy model's image encoder: shape (n, d)."""
    pixels = (images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    return torch.cat([_clip()(batch) for batch in chunked(map(Image.fromarray, pixels), 32)])
