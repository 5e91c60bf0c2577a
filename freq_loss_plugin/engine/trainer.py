"""The training loop: one step, saving, resuming, stopping.

One optimizer step (`Trainer._train_step`) goes through its batches n = step·gradient_accumulation_steps + i. For each
(`Trainer.add_gradient`):

    images of batch n        `Batches`: seed and n determine them
    plan                     `FrequencyTerm`: at which timesteps the batch trains, and whether it has an extra pass
    extra pass               mode unified: all samples at one timestep; its term is propagated at once, so that only one
                             graph is alive at a time
    base pass                noise and timesteps from a generator that is seeded with seed and n; timesteps below an
                             image's least timestep are drawn again
    base loss                mean squared error, with min-SNR weights if min_snr_gamma is set
    join, backward           own and shared: the term of the base pass is added to the base loss

and then:

    settle                   read the numbers of all batches; raises if one is not finite, before the optimizer runs
    clip, optimizer, learning rate schedule

No random number depends on the state of a global generator, so a resumed run is bit-identical to an uninterrupted one.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ..lora import kohya_format
from ..loss.latents import NUM_TRAIN_TIMESTEPS
from ..loss.sample_weights import min_snr_weights
from ..options.config import FreqLossConfig
from ..training.monitor import NonFiniteLossError, StepMetrics
from ..training.passes import Pass
from ..training.random_streams import named_generator
from ..training.term import FrequencyTerm
from ..training.timesteps import Draws
from .checkpoint import metadata, write_state
from .dataset import Batches, DataSet, Example
from .evaluation import ValidationSet
from .interrupt import stop_on_signal
from .model import Model
from .optimization import make_optimizer
from .outcome import Outcome
from .settings import Settings
from .tracking import Tracking

# Per run, unless validate_every_n_steps is set.
_EVALUATIONS = 10


class Trainer:
    """Trains the LoRA layers of a model; see `freq_loss_plugin.engine.run.train`.

    Args:
        settings: the training settings.
        loss: the options of the frequency loss.
        data: the training images.
        model: the model with fresh LoRA layers.
        accelerator: device, precision and trackers.

    Attributes:
        parameters: the trained parameters.
    """

    def __init__(
        self, settings: Settings, loss: FreqLossConfig, data: DataSet, model: Model, accelerator: Accelerator
    ) -> None:
        self._settings, self._loss, self._data, self._model = settings, loss, data, model
        self._accelerator = accelerator
        self._batches = Batches(data.examples, settings.train_batch_size, settings.seed)
        self.parameters = [parameter for prefix in model.adapted for parameter in model.trainable(prefix)]
        self._optimizer, self._schedule = accelerator.prepare(*make_optimizer(model, settings))
        self._alphas_cumprod = model.scheduler.alphas_cumprod.float().to(accelerator.device)
        self._term = self._make_term(first_batch=0)
        self._latents: list[Tensor] = []
        self._history: list[StepMetrics] = []
        self._started = time.time()
        self._step = 0
        self._saved: tuple[int, Path] | None = None
        self._errors_before: Tensor | None = None

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state that `read_state` returned."""
        kohya_format.load_kohya_weights(self._model.adapted, state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        if state["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        self._step = state["step"]
        self._errors_before = state["errors_before"]
        self._term = self._make_term(first_batch=self._step * self._settings.gradient_accumulation_steps)
        self._term.load_state_dict(state["term"])
        print(f"continuing after step {self._step}")

    def run(self, held_out: list[Example], title: str) -> Outcome:
        """Train to the end or until Ctrl-C, and save the LoRA in both cases.

        Arguments and errors as for `freq_loss_plugin.engine.run.train`; also OSError, where a file cannot be written.
        """
        settings = self._settings
        self.encode()
        latents = self._encode(held_out, "encoding validation images")
        validation = ValidationSet(held_out, latents, self._pass_at, self._base_loss)
        tracking = Tracking(self._accelerator, settings)
        evaluations = []
        if self._errors_before is None:
            self._errors_before = validation.errors(self._loss.bands)
        start = time.perf_counter()
        every = settings.validate_every_n_steps or max(1, settings.max_train_steps // _EVALUATIONS)
        with stop_on_signal() as stop, self._bar(title) as bar:
            evaluations.append(validation.evaluate(self._term, self._step, tracking))
            while self._step < settings.max_train_steps and not stop.is_set():
                metrics = self._train_step()
                self._show(metrics, bar, tracking)
                if self._step % every == 0 or self._step == settings.max_train_steps:
                    evaluations.append(validation.evaluate(self._term, self._step, tracking))
                if self._is_time_to_save():
                    self._save(self._step_file())
            finished = self._step >= settings.max_train_steps
            lora = self._save(settings.lora_file if finished else self._step_file())
        tracking.close()
        seconds = time.perf_counter() - start
        if not finished:
            print(f"\nstopped after step {self._step} of {settings.max_train_steps}, and saved: {lora}")
            print("continue with the same command and --resume")
        done = [evaluation for evaluation in evaluations if evaluation is not None]
        errors = self._errors_before, validation.errors(self._loss.bands)
        return Outcome(
            lora, self._step, seconds, finished, self._history, done, errors, self._model, self._data.features
        )

    def encode(self) -> None:
        """Encode the training images, and restore the latents of those with defects."""
        self._latents = self._data.restored(self._encode(self._data.examples, "encoding images"))

    def add_gradient(self, number: int) -> None:
        """Run the passes of batch ``number`` and accumulate its gradient in the parameters."""
        indices = self._batches[number]
        latents = torch.stack([self._latents[i] for i in indices])
        examples = [self._data.examples[i] for i in indices]
        window = self._settings.min_timestep or 0, self._settings.max_timestep or NUM_TRAIN_TIMESTEPS
        least = self._data.least_of(examples)

        def draw(count: int) -> Tensor:
            return torch.randint(*window, (count,))

        plan = self._term.plan(least)
        if plan.extra is not None:
            extra = self._pass_at(latents, plan.extra, examples, named_generator(plan.stream))
            self._term.extra_pass(extra, self.backward)
        generator = named_generator(f"base:{self._settings.seed}:{number}")
        # Always drawn, so that the noise is the same with and without the loss.
        timesteps = torch.randint(*window, (len(indices),), generator=generator)
        if plan.chooses:
            timesteps = self._term.choose(Draws(timesteps, draw))
        passed = self._pass(latents, timesteps, examples, generator)
        balanced = self._term.balance(passed)
        base_loss = self._base_loss(passed._replace(prediction=balanced.prediction), balanced.weights)
        self.backward(self._term.join(passed, base_loss))

    def backward(self, loss: Tensor) -> None:
        """Backpropagate the loss of one batch."""
        self._accelerator.backward(loss / self._settings.gradient_accumulation_steps)

    def _train_step(self) -> StepMetrics:
        accumulation = self._settings.gradient_accumulation_steps
        for i in range(accumulation):
            self.add_gradient(self._step * accumulation + i)
        metrics = self._term.settle(self._step + 1)
        assert metrics is not None
        if not abs(metrics.base) < float("inf"):
            raise NonFiniteLossError(
                f"the loss is not finite in step {self._step + 1}: base loss = {metrics.base}. The run has diverged: "
                "lower the learning rate, or use bf16 instead of fp16. The last saved file is intact"
            )
        if self._settings.max_grad_norm:
            self._accelerator.clip_grad_norm_(self.parameters, self._settings.max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        self._step += 1
        self._history.append(metrics)
        return metrics

    def _pass_at(self, latents: Tensor, timestep: int, examples: list[Example], generator: torch.Generator) -> Pass:
        """Run the model with all samples at one timestep."""
        passed = self._pass(latents, torch.full((len(latents),), timestep), examples, generator)
        return passed._replace(timesteps=timestep)

    def _pass(self, latents: Tensor, timesteps: Tensor, examples: list[Example], generator: torch.Generator) -> Pass:
        """Noise the clean latents (B, C, H, W) and run the model on them."""
        device = self._accelerator.device
        noise = torch.randn(latents.shape, generator=generator).to(device)
        timesteps = timesteps.to(device)
        captions, features = [example.caption for example in examples], None
        if self._data.features is not None:
            by_image = self._data.features.by_image
            features = torch.stack([by_image[example.file] for example in examples]).to(device)
        with self._accelerator.autocast():
            prediction, target = self._model.predict(latents.to(device), timesteps, noise, captions, features)
        return Pass(prediction, target, timesteps, self._alphas_cumprod)

    def _base_loss(self, passed: Pass, weights: Tensor | None = None) -> Tensor:
        per_sample = (passed.prediction - passed.target).square().mean(dim=(1, 2, 3))
        gamma = self._settings.min_snr_gamma
        if gamma is not None:
            kind, alphas = self._settings.prediction_type, self._alphas_cumprod
            per_sample = per_sample * min_snr_weights(kind, passed.timesteps, alphas, gamma)
        return (per_sample if weights is None else per_sample * weights).mean()

    def _make_term(self, first_batch: int) -> FrequencyTerm:
        settings = self._settings
        return FrequencyTerm(
            self._loss,
            settings.prediction_type,
            seed=settings.seed,
            first_batch=first_batch,
            max_train_steps=settings.max_train_steps,
            least=self._data.least_per_epoch,
        )

    def _encode(self, examples: list[Example], title: str) -> list[Tensor]:
        with tqdm(total=len(examples), desc=title, leave=False, disable=not examples, file=sys.stdout) as bar:
            return self._model.encode(examples, self._settings.seed, bar.update)

    def _bar(self, title: str) -> tqdm:
        total = self._settings.max_train_steps
        return tqdm(total=total, initial=self._step, desc=title, file=sys.stdout, dynamic_ncols=True)

    def _show(self, metrics: StepMetrics, bar: tqdm, tracking: Tracking) -> None:
        text = f"base {metrics.base:.4f}"
        logs = {"loss/current": metrics.base + metrics.total, "lr/unet": self._schedule.get_last_lr()[0]}
        if self._loss.enabled:
            text += f", low {metrics.low:.4f}, high {metrics.high:.4f}, term {metrics.fraction:.1%}"
        logs |= metrics.logs(has_term=self._loss.enabled)
        bar.set_postfix_str(text)
        bar.update()
        if metrics.message is not None and self._loss.enabled:
            bar.write(f"freq_loss: {metrics.message.text}", file=sys.stdout)
        tracking.log(logs, self._step)
        if tracking.is_on:
            tracking.log_image("loss/balance_weights", self._term.balance_plot(), self._step)

    def _is_time_to_save(self) -> bool:
        every = self._settings.save_every_n_steps
        return every is not None and self._step % every == 0 and self._step < self._settings.max_train_steps

    def _step_file(self) -> Path:
        return self._settings.lora_file.with_name(f"{self._settings.output_name}-step{self._step:08d}.safetensors")

    def _save(self, file: Path) -> Path:
        """Write the LoRA and the state, unless this step is already in this file."""
        if self._saved == (self._step, file):
            return file
        weights = kohya_format.kohya_weights(self._model.adapted)
        entries = metadata(self._settings, self._loss, self._data, self._step, self._started)
        kohya_format.save(file, weights, entries, self._settings.save_precision)
        scaler = getattr(self._accelerator, "scaler", None)
        state = {
            "step": self._step,
            "model": self._model.identity,
            "weights": weights,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "term": self._term.state_dict(),
            "errors_before": self._errors_before,
        }
        write_state(self._settings, self._loss, self._data, state)
        self._saved = self._step, file
        return file
