"""Trains with plain MSE and frequency-aware, and shows both side by side: samples from the same seeds, and curves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DDIMScheduler
from torch import Tensor, autocast

from ..options.config import FreqLossConfig
from ..options.fields import ConfigError
from . import plots
from .dataset import Example, find, load_pixels
from .model import Model, load
from .outcome import Outcome
from .run import train
from .settings import Settings

# How many training images are read for the spectrum.
_MAX_IMAGES = 64
PLAIN, FREQUENCY_AWARE = "plain MSE", "frequency-aware"
_TRAINING, _TRUE = "training images", "true images of the prompts"


@dataclass(frozen=True)
class Sampling:
    """How images are sampled, with DDIM.

    Attributes:
        prompts: one for each image.
        steps: sampling steps.
        guidance: the scale of classifier-free guidance.
        seed: seed of the first image; image i has seed + i.
        features: the features for the guidance token, shape (B or 1, width); None without one.
    """

    prompts: list[str]
    steps: int = 20
    guidance: float = 7.5
    seed: int = 0
    features: Tensor | None = None


@dataclass(frozen=True)
class Comparison:
    """The result of `train_and_compare`.

    Attributes:
        outcomes: what each run left behind, by its name.
        files: the images that were written.
    """

    outcomes: dict[str, Outcome]
    files: list[Path]

    @property
    def finished(self) -> bool:
        """False if a run was interrupted."""
        return all(outcome.finished for outcome in self.outcomes.values())


@torch.no_grad()
def sample(model: Model, sampling: Sampling, size: tuple[int, int]) -> Tensor:
    """Sample images for the prompts.

    Args:
        model: the model with its LoRA layers.
        sampling: prompts, steps and seeds.
        size: (width, height) in pixels.

    Returns:
        Shape (B, 3, H, W), 0..1.
    """
    pipeline = model.pipeline
    pipeline.scheduler = DDIMScheduler.from_config(model.scheduler.config, set_alpha_to_one=False, steps_offset=1)
    pipeline.set_progress_bar_config(disable=True)
    precision = autocast(model.device.type, pipeline.unet.dtype, enabled=pipeline.unet.dtype != torch.float32)
    with precision:
        states = model.text_states(sampling.prompts, sampling.features)
        latents = pipeline(
            prompt_embeds=states,
            negative_prompt_embeds=model.text_states([""] * len(states)),
            width=size[0],
            height=size[1],
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=[torch.Generator().manual_seed(sampling.seed + i) for i in range(len(sampling.prompts))],
            output_type="latent",
        ).images
    pixels = [pipeline.vae.decode(z[None].float() / pipeline.vae.config.scaling_factor).sample[0] for z in latents]
    return (torch.stack(pixels).cpu() / 2 + 0.5).clamp(0, 1)


def train_and_compare(
    settings: Settings,
    loss: FreqLossConfig,
    *,
    sampling: Sampling,
    resume: bool = False,
    held_out: list[Example] | None = None,
) -> Comparison:
    """Train once with plain MSE and once with the loss, all else equal, and plot both.

    With a guidance token both are trained with it, and their samples use the mean of the training images' features.

    Besides the two LoRA files this writes ``comparison.png`` (training images, samples before training, with plain MSE,
    with the loss) and ``curves.png`` (validation errors, radial spectra) to ``output_dir``.

    Args:
        settings: see `freq_loss_plugin.engine.settings`.
        loss: the options of the frequency loss; the run with plain MSE differs in nothing else.
        sampling: the samples in ``comparison.png``.
        resume: continue from saved states.
        held_out: images on which to evaluate the bands; not trained on.

    Raises:
        ConfigError: settings, data or model cannot be used, or there is no state to resume from.
        NonFiniteLossError: a run has diverged.
    """
    off = replace(loss.without_effect(), gradient_ratio=0.0, grad_cosine=False, validation=False)
    plain = replace(settings, output_name=f"{settings.output_name}-plain_mse")
    arms = {PLAIN: (plain, off), FREQUENCY_AWARE: (settings, loss)}
    if resume and not any(arm.state_file.is_file() for arm, _ in arms.values()):
        raise ConfigError(
            f"--resume: no saved state in {settings.output_dir}; train without --resume first, or check output_dir"
        )
    examples = find(settings).examples
    size = examples[0].size
    rows = {_TRAINING: _pixels([example for example in examples if example.size == size][:_MAX_IMAGES])}
    if held_out is not None:  # the prompts are the captions of the first of them
        rows[_TRUE] = _pixels(held_out)
    outcomes: dict[str, Outcome] = {}
    print("sampling from the model before training")
    rows["before"] = sample(load(settings, PartialState().device), sampling, size)
    for name, (arm, options) in arms.items():
        print(f"\n{name}:")
        can_resume = resume and arm.state_file.is_file()
        outcomes[name] = train(arm, options, resume=can_resume, held_out=held_out, title=name)
        if not outcomes[name].finished:
            return Comparison(outcomes, [])
        features = outcomes[name].features
        guided = sampling if features is None else replace(sampling, features=features.mean[None])
        rows[name] = sample(outcomes[name].model, guided, size)
    folder = Path(settings.output_dir)
    # Spectra are compared with those of true images, which may be better than the training images.
    of_less_use = _TRAINING if _TRUE in rows else _TRUE
    files = [
        plots.comparison(folder / "comparison.png", rows, sampling.prompts),
        plots.curves(folder / "curves.png", outcomes, {name: rows[name] for name in rows if name != of_less_use}),
    ]
    return Comparison(outcomes, files)


def _pixels(examples: list[Example]) -> Tensor:
    return torch.stack([load_pixels(example) for example in examples]) / 2 + 0.5
