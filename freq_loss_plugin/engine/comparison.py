"""Trains with and without the loss and lays the results side by side: pictures with the same seeds, and curves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DDIMScheduler
from torch import Tensor, autocast

from ..config import FreqLossConfig
from ..options import ConfigError
from . import plots
from .dataset import Example, find, load_pixels
from .model import Model, load
from .settings import Settings
from .training import Outcome, train

PLAIN, OURS = "plain MSE", "with the frequency loss"


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn: DDIM, the same noise for the same place.

    Attributes:
        prompts: one for each picture.
        steps: of the sampler.
        guidance: scale of classifier-free guidance.
        seed: of the first picture; the next ones count on.
        features: for the guidance token of the prompts, shape (B or 1, width); None for none.
    """

    prompts: list[str]
    steps: int = 20
    guidance: float = 7.5
    seed: int = 0
    features: Tensor | None = None


@dataclass(frozen=True)
class Shown:
    """What a training with `train_and_show` leaves: its outcomes by arm, and the pictures that were made of them."""

    outcomes: dict[str, Outcome]
    files: list[Path]

    @property
    def finished(self) -> bool:
        """False where one arm was interrupted."""
        return all(outcome.finished for outcome in self.outcomes.values())


@torch.no_grad()
def sample(model: Model, sampling: Sampling, size: tuple[int, int]) -> Tensor:
    """Pictures for the prompts, shape (B, 3, H, W), 0..1."""
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


def train_and_show(
    settings: Settings,
    loss: FreqLossConfig,
    *,
    sampling: Sampling,
    resume: bool = False,
    held_out: list[Example] | None = None,
) -> Shown:
    """Train once with plain MSE and once with the loss, all else equal, and draw both.

    With a guidance token both are trained with it, and their samples get the mean of the training pictures' features.

    Beside the two LoRA files this writes ``comparison.png`` (training pictures, samples before, after plain MSE, after
    the loss) and ``curves.png`` (band losses, radial spectra) to ``output_dir``. Arguments and errors as for
    `freq_loss_plugin.engine.training.train`.
    """
    off = replace(loss, dist_match=0.0, share=0.0, grad_cosine=False, validation=False)
    plain = replace(settings, output_name=f"{settings.output_name}-plain_mse"), off
    arms = {PLAIN: plain, OURS: (settings, loss)}
    if resume and not any(arm.state_file.is_file() for arm, _ in arms.values()):
        raise ConfigError(
            f"--resume: no saved state in {settings.output_dir}; train without --resume first, or check output_dir"
        )
    examples = find(settings).examples
    size = examples[0].size
    data = torch.stack([load_pixels(each) for each in examples if each.size == size][:64]) / 2 + 0.5
    rows = {"training pictures": data}
    outcomes: dict[str, Outcome] = {}
    print("drawing samples of the model as it is")
    rows["before"] = sample(load(settings, PartialState().device), sampling, size)
    for name, (arm, options) in arms.items():
        print(f"\n{name}:")
        go_on = resume and arm.state_file.is_file()
        outcomes[name] = train(arm, options, resume=go_on, held_out=held_out, title=name)
        if not outcomes[name].finished:
            return Shown(outcomes, [])
        features = outcomes[name].features
        guided = sampling if features is None else replace(sampling, features=features.mean[None])
        rows[name] = sample(outcomes[name].model, guided, size)
    folder = Path(settings.output_dir)
    files = [
        plots.comparison(folder / "comparison.png", rows, sampling.prompts),
        plots.curves(folder / "curves.png", outcomes, rows),
    ]
    return Shown(outcomes, files)
