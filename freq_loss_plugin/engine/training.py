"""The training: one step, saving, resuming, stopping.

One optimizer step, for each of its batches n = step·gradient_accumulation_steps + i:

    latents, captions of batch n          dataset.Batches: seed and n decide
    base pass at random timesteps         noise and timesteps from a generator of their own, named by seed and n
    base loss                             mean squared error, with min-SNR weights where asked for
    backward                              with the frequency term, where it is computed from the same pass (own)
    unified pass at one timestep, term    backward at once, so that one graph is alive at a time
    numbers arrived?                      not finite -> stop; the optimizer has not run
    clip, optimizer, scheduler

Nothing random is left to the state of a global generator, so a resumed training is the uninterrupted one.
"""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

from .. import guidance, report
from ..balance import Balance, Weighed, base_gradient, detached_term
from ..config import FreqLossConfig
from ..drawing import spectrum_plot
from ..latents import NUM_TRAIN_TIMESTEPS, residual_scale
from ..loss import FrequencyLoss, frequency_matching_loss, min_snr_weights
from ..memory import ResidualMemory
from ..options import ConfigError
from ..step import NonFiniteLossError, TermMonitor, TermNumbers, shared_timesteps, stream_name, unified_timestep
from ..validation import ValidationBands
from . import lora_file
from .dataset import Batches, DataSet, Example, find, split
from .lora_file import TEXT_ENCODER, UNET
from .model import Model, image_encoder_of, load
from .settings import USE_SD_SCRIPTS, Settings

# What may change between a saved state and its continuation.
_MAY_CHANGE = {"max_train_steps", "save_every_n_steps", "save_precision", "logging_dir", "output_dir", "output_name"}
# Evaluations on held-out pictures: how many in a training, and at which timesteps.
_EVALUATIONS = 10
_EVALUATION_TIMESTEPS = (300, 500)
_EVALUATION_BATCH = 16


@dataclass(frozen=True)
class Evaluation:
    """L_low and L_high on held-out pictures after ``step`` steps: a mean over fixed noise and timesteps."""

    step: int
    low: float
    high: float


@dataclass
class Outcome:
    """What a training leaves behind.

    Attributes:
        lora: the file that was written last.
        step: optimizer steps done.
        seconds: what they took, without loading and encoding.
        finished: False where it was interrupted.
        history: the numbers of every step of this run.
        evaluations: on held-out pictures, where there are any.
        model: the model with its LoRA layers as they are now.
        features: those of the guidance token, where it is on.
    """

    lora: Path
    step: int
    seconds: float
    finished: bool
    history: list[TermNumbers]
    evaluations: list[Evaluation]
    model: Model = field(repr=False)
    features: guidance.Features | None = field(repr=False, default=None)


def train(
    settings: Settings,
    loss: FreqLossConfig,
    *,
    resume: bool = False,
    held_out: list[Example] | None = None,
    title: str = "training",
) -> Outcome:
    """Train a LoRA from settings to file.

    Args:
        settings: see `freq_loss_plugin.engine.settings`.
        loss: the options of the frequency loss; with ``dist_match`` = 0 this is plain LoRA training.
        resume: go on from the state that an earlier training with these settings saved.
        held_out: pictures on which to evaluate the bands now and then; not trained on.
        title: in front of the progress bar.

    Raises:
        ConfigError: settings, data or model cannot be used, or the state to resume from is not there or another's.
        NonFiniteLossError: the training has diverged.
    """
    accelerator = _accelerator(settings)
    loss.check_model(settings.prediction_type, zero_terminal_snr=settings.zero_terminal_snr)
    data, held_out = find(settings), held_out or []
    if settings.validation_split:
        data, validated = split(data, settings.validation_split, settings.seed)
        held_out = [*held_out, *validated]
    for example in data.examples:
        loss.check_size(example.size[1] // 8, example.size[0] // 8)
    if loss.guided:
        data = replace(data, features=_load_features(settings, data.examples, held_out))
    state = _read_state(settings, loss, data.features) if resume else None
    logs = _writer(settings)
    model = load(settings, accelerator.device)
    if data.features is not None:
        guidance.check_width(data.features, model.text_width, _extraction_command(settings))
    _announce(settings, loss, data, accelerator, validates=bool(held_out))
    return Trainer(settings, loss, data, model, accelerator, held_out, title).run(state, logs)


class Trainer:
    """A training under way; see `train`."""

    def __init__(
        self,
        settings: Settings,
        loss: FreqLossConfig,
        data: DataSet,
        model: Model,
        accelerator: Accelerator,
        held_out: list[Example],
        title: str,
    ) -> None:
        self._settings, self._loss, self._data, self._model, self._title = settings, loss, data, model, title
        self._accelerator = accelerator
        self._batches = Batches(data.examples, settings.train_batch_size, settings.seed)
        self._parameters = [parameter for prefix in model.adapted for parameter in model.trainable(prefix)]
        self._optimizer, self._schedule = accelerator.prepare(*self._make_optimizer())
        # Twice, so that looking up alpha_bar moves nothing between them in a step.
        self._alphas_on_host = model.scheduler.alphas_cumprod.float()
        self._alphas_on_device = self._alphas_on_host.to(accelerator.device)
        self._memory = ResidualMemory(loss) if loss.memory else None
        self._balance = Balance(loss) if Balance.is_wanted(loss) else None
        self._gradients = self._balance.share if self._balance is not None else None
        self._monitor = TermMonitor()
        self._share = report.ShareReport(settings.max_train_steps, held=bool(loss.share))
        self._history: list[TermNumbers] = []
        self._evaluations: list[Evaluation] = []
        self._held_out = held_out
        sizes = dict.fromkeys(example.size for example in held_out)
        of_size = ([index for index, each in enumerate(held_out) if each.size == size] for size in sizes)
        self._held_out_batches = [
            chosen[i : i + _EVALUATION_BATCH] for chosen in of_size for i in range(0, len(chosen), _EVALUATION_BATCH)
        ]
        self._started = time.time()
        self._step = 0
        self._saved: tuple[int, Path] | None = None

    def run(self, state: dict[str, Any] | None, logs: Any = None) -> Outcome:
        """Train to the end, or until Ctrl-C; what was trained is saved in both cases."""
        if state:
            self._restore(state)
        self._latents = self._encode(self._data.examples, "encoding pictures")
        self._held_out_latents = self._encode(self._held_out, "encoding held-out pictures")
        began = time.perf_counter()
        every = self._settings.validate_every_n_steps or max(1, self._settings.max_train_steps // _EVALUATIONS)
        with _stop_on_signal() as stop, self._bar() as bar:
            self._evaluate(logs)
            while self._step < self._settings.max_train_steps and not stop.is_set():
                numbers = self._train_step()
                bar.set_postfix_str(_show(numbers, self._loss))
                bar.update()
                self._log(logs, numbers, bar)
                if self._step % every == 0 or self._step == self._settings.max_train_steps:
                    self._evaluate(logs)
                if self._is_time_to_save():
                    self._save(self._step_file())
            finished = self._step >= self._settings.max_train_steps
            lora = self._save(self._settings.lora_file if finished else self._step_file())
        if logs is not None:
            logs.close()
        seconds = time.perf_counter() - began
        if not finished:
            print(
                f"\nstopped after step {self._step} of {self._settings.max_train_steps}, and saved: {lora}\n"
                "go on with the same command and --resume"
            )
        return Outcome(
            lora, self._step, seconds, finished, self._history, self._evaluations, self._model, self._data.features
        )

    # One step

    def _train_step(self) -> TermNumbers:
        accumulation = self._settings.gradient_accumulation_steps
        for i in range(accumulation):
            self._backward(self._step * accumulation + i)
        arrived = self._monitor.settle(self._step + 1)
        numbers = TermNumbers.mean(arrived)
        if not abs(numbers.base) < float("inf"):
            raise NonFiniteLossError(
                f"the loss is not finite in step {self._step + 1}: base loss = {numbers.base}. The training has "
                "diverged: lower the learning rate, or use bf16 instead of fp16. The last saved file is intact"
            )
        if self._settings.max_grad_norm:
            self._accelerator.clip_grad_norm_(self._parameters, self._settings.max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        self._step += 1
        self._history.append(numbers)
        return numbers

    def _backward(self, number: int) -> None:
        """Add the gradient of batch ``number`` of the training."""
        chosen = self._batches[number]
        latents = torch.stack([self._latents[index] for index in chosen]).to(self._accelerator.device)
        examples = [self._data.examples[index] for index in chosen]
        generator = _generator(f"base:{self._settings.seed}:{number}")
        window = self._settings.min_timestep or 0, self._settings.max_timestep or NUM_TRAIN_TIMESTEPS
        drawn, shared = torch.randint(*window, (len(chosen),), generator=generator), None
        if self._loss.enabled and self._loss.timesteps == "shared":
            name = f"{stream_name(self._settings.seed, number)}:shared"
            drawn, shared = shared_timesteps(lambda n: torch.randint(*window, (n,)), len(chosen), self._loss, name)
        drawn = drawn.to(latents.device)
        prediction, target = self._pass(latents, drawn, examples, generator)
        base = self._base_loss(prediction, target, drawn)
        beside = base_gradient(base, prediction) if self._balance is not None else None
        term = Weighed(FrequencyLoss(*torch.zeros(3, device=base.device)), {})
        timesteps: Tensor | float = drawn
        if self._loss.enabled and self._loss.timesteps == "own":
            term = self._weighed_term(prediction, target, drawn, beside)
        elif shared is not None:
            term = self._weighed_term(prediction, target, shared, beside)
        self._accumulate(base + term.loss.total)
        if self._loss.enabled and self._loss.timesteps == "unified":
            if self._balance is not None and beside is not None:
                self._balance.observe_base(beside)
            timesteps = unified_timestep(self._loss, self._settings.seed, number)
            generator = _generator(stream_name(self._settings.seed, number))
            prediction, target = self._pass(latents, torch.full_like(drawn, timesteps), examples, generator)
            term = self._weighed_term(prediction, target, timesteps, None)
            self._accumulate(term.loss.total)
        self._monitor.add(base, term.loss, prediction, target, timesteps, term.logs)

    def _weighed_term(
        self, prediction: Tensor, target: Tensor, timesteps: Tensor | float, beside: Tensor | None
    ) -> Weighed:
        """The term of a pass, against the base gradient ``beside`` where that is of the same pass."""

        def term(prediction: Tensor) -> FrequencyLoss:
            return self._term(prediction, target, timesteps, self._memory)

        if self._balance is None:
            return Weighed(term(prediction), {})
        residual = prediction.detach() - target
        return self._balance.weigh(
            prediction,
            detached_term(prediction, term),
            residual if beside is None else beside,
            same_pass=beside is not None,
        )

    def _pass(
        self, latents: Tensor, timesteps: Tensor, examples: list[Example], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        captions, features = [example.caption for example in examples], None
        if self._data.features is not None:
            of_pictures = self._data.features.by_picture
            features = torch.stack([of_pictures[example.file] for example in examples]).to(latents.device)
        with self._accelerator.autocast():
            return self._model.predict(latents, timesteps, noise, captions, features)

    def _base_loss(self, prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        per_sample = (prediction - target).square().mean(dim=(1, 2, 3))
        if self._settings.min_snr_gamma is not None:
            per_sample = per_sample * min_snr_weights(
                self._settings.prediction_type,
                timesteps,
                self._alphas_on_device,
                self._settings.min_snr_gamma,
            )
        return per_sample.mean()

    def _term(
        self,
        prediction: Tensor,
        target: Tensor,
        timesteps: Tensor | float,
        memory: ResidualMemory | None = None,
    ) -> FrequencyLoss:
        return frequency_matching_loss(
            prediction,
            target,
            prediction_type=self._settings.prediction_type,
            timesteps=timesteps,
            alphas_cumprod=self._alphas_on_device if isinstance(timesteps, Tensor) else self._alphas_on_host,
            config=self._loss,
            memory=memory,
        )

    def _accumulate(self, loss: Tensor) -> None:
        self._accelerator.backward(loss / self._settings.gradient_accumulation_steps)

    @torch.no_grad()
    def _evaluate(self, logs: Any) -> None:
        if not self._held_out:
            return
        reported = logs is not None and self._loss.enabled and self._loss.validation
        bands = ValidationBands(self._loss) if reported else None
        found = []
        for timestep in _EVALUATION_TIMESTEPS:
            generator = _generator(f"evaluation:{timestep}")
            for chosen in self._held_out_batches:
                clean = torch.stack([self._held_out_latents[index] for index in chosen]).to(self._accelerator.device)
                timesteps = torch.full((len(clean),), timestep, device=clean.device)
                examples = [self._held_out[index] for index in chosen]
                prediction, target = self._pass(clean, timesteps, examples, generator)
                term = self._term(prediction, target, timestep)
                base = self._base_loss(prediction, target, timesteps)
                found.append((term.low.item(), term.high.item(), base.item()))
                if bands is not None:
                    scale = residual_scale(self._settings.prediction_type, timestep, self._alphas_on_host)
                    bands.add(clean, prediction - target, scale, timestep)
        low, high, loss = (sum(values) / len(values) for values in zip(*found, strict=True))
        self._evaluations.append(Evaluation(self._step, low, high))
        if logs is None:
            return
        logs.add_scalar("loss/validation/step_average", loss, self._step)
        result = bands.finish() if bands is not None else None
        if result is None:
            return
        for name, value in result.numbers.items():
            logs.add_scalar(f"loss/validation/freq_{name}", value, self._step)
        picture = spectrum_plot(result.spectra, "A: predicted clean latents, B: clean latents")
        logs.add_image("loss/validation/freq_spectrum", picture.numpy(), self._step, dataformats="HWC")

    # Before and after

    def _make_optimizer(self) -> tuple[Any, Any]:
        rates = dict(zip((UNET, TEXT_ENCODER), self._settings.learning_rates, strict=True))
        groups = [{"params": self._model.trainable(prefix), "lr": rates[prefix]} for prefix in self._model.adapted]
        optimizer = torch.optim.AdamW(groups)
        schedule = get_scheduler(
            self._settings.lr_scheduler,
            optimizer,
            num_warmup_steps=self._settings.lr_warmup_steps,
            num_training_steps=self._settings.max_train_steps,
            num_cycles=self._settings.lr_scheduler_num_cycles,
        )
        return optimizer, schedule

    def _encode(self, examples: list[Example], title: str) -> list[Tensor]:
        with tqdm(total=len(examples), desc=title, leave=False, disable=not examples, file=sys.stdout) as bar:
            return self._model.encode(examples, self._settings.seed, bar.update)

    def _bar(self) -> tqdm:
        total = self._settings.max_train_steps
        return tqdm(total=total, initial=self._step, desc=self._title, file=sys.stdout, dynamic_ncols=True)

    def _log(self, logs: Any, numbers: TermNumbers, bar: tqdm) -> None:
        if self._loss.enabled:
            self._share.add(numbers.share)
            remark = self._share.after_step(self._step)
            if remark is not None:
                bar.write(f"freq_loss: {remark.text}", file=sys.stdout)
        if logs is None:
            return
        logs.add_scalar("loss/current", numbers.base + numbers.total, self._step)
        logs.add_scalar("lr/unet", self._schedule.get_last_lr()[0], self._step)
        for name, value in numbers.logs().items() if self._loss.enabled else ():
            logs.add_scalar(name, value, self._step)

    def _is_time_to_save(self) -> bool:
        every = self._settings.save_every_n_steps
        return every is not None and self._step % every == 0 and self._step < self._settings.max_train_steps

    def _step_file(self) -> Path:
        return self._settings.lora_file.with_name(f"{self._settings.output_name}-step{self._step:08d}.safetensors")

    def _save(self, file: Path) -> Path:
        """Write the LoRA and the state; the same step is not written twice under the same name."""
        if self._saved == (self._step, file):
            return file
        weights = lora_file.kohya_weights(self._model.adapted)
        texts = lora_file.metadata(self._settings, self._loss, self._data, self._step, self._started)
        lora_file.save(file, weights, texts, self._settings.save_precision)
        scaler = getattr(self._accelerator, "scaler", None)
        state = {
            "step": self._step,
            "settings": _identity(self._settings, self._loss, self._data.features),
            "weights": weights,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "memory": self._memory.state_dict() if self._memory is not None else {},
            "share": self._gradients.state_dict() if self._gradients is not None else {},
        }
        lora_file.write_whole(self._settings.state_file, lambda part: torch.save(state, part))
        self._saved = self._step, file
        return file

    def _restore(self, state: dict[str, Any]) -> None:
        lora_file.load_kohya_weights(self._model.adapted, state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        if state["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        if self._memory is not None:
            self._memory.load_state_dict(state["memory"])
        if self._gradients is not None:
            self._gradients.load_state_dict(state["share"])
        self._step = state["step"]
        print(f"going on after step {self._step}")


def _accelerator(settings: Settings) -> Accelerator:
    AcceleratorState._reset_state()  # an earlier training of this process may have had another precision
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    if accelerator.num_processes > 1:
        raise ConfigError(f"{accelerator.num_processes} processes: the engine trains in one. {USE_SD_SCRIPTS}")
    if settings.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError('mixed_precision = "fp16" needs a GPU; on a CPU use "no" or "bf16"')
    return accelerator


def _announce(
    settings: Settings, loss: FreqLossConfig, data: DataSet, accelerator: Accelerator, *, validates: bool
) -> None:
    family = "SD2.x" if settings.v2 else "SD1.x"
    model = f"{family} (prediction type {settings.prediction_type})"
    print("\n".join(report.describe(loss, model, lora_file.NETWORK_MODULE, features=data.features)))
    shown = sum(example.repeats for example in data.examples)
    print(f"  {len(data.examples)} pictures, {shown} per epoch, on {accelerator.device}")
    window = settings.min_timestep, settings.max_timestep
    logs = settings.logging_dir is not None
    found = report.warnings(loss, settings.train_batch_size, *window, validates=validates, logs=logs)
    for warning in [*data.warnings, *found]:
        print(f"warning: {warning}")


def _show(numbers: TermNumbers, loss: FreqLossConfig) -> str:
    if not loss.enabled:
        return f"base {numbers.base:.4f}"
    return f"base {numbers.base:.4f}, low {numbers.low:.4f}, high {numbers.high:.4f}, share {numbers.share:.1%}"


def _generator(name: str) -> torch.Generator:
    """A generator on the CPU that depends on ``name`` only: the same numbers whatever the device."""
    return torch.Generator().manual_seed(random.Random(name).getrandbits(63))


def _load_features(settings: Settings, examples: list[Example], held_out: list[Example]) -> guidance.Features:
    """Those of all pictures; held-out ones do not count in the mean."""
    shown = {example.file: float(example.repeats) for example in examples}
    return guidance.load(shown | {example.file: 0.0 for example in held_out}, _extraction_command(settings))


def _extraction_command(settings: Settings) -> str:
    return guidance.extraction_command(
        {"train_data_dir": settings.train_data_dir, "clip": image_encoder_of(settings.pretrained_model_name_or_path)}
    )


def _identity(settings: Settings, loss: FreqLossConfig, features: guidance.Features | None) -> dict[str, str]:
    """What must be the same when a training goes on."""
    kept = {key: str(value) for key, value in asdict(settings).items() if key not in _MAY_CHANGE}
    kept |= {key: str(value) for key, value in loss.metadata().items()}
    return kept if features is None else kept | {guidance.CLIP_KEY: features.clip}


def _read_state(settings: Settings, loss: FreqLossConfig, features: guidance.Features | None) -> dict[str, Any]:
    file = settings.state_file
    if not file.is_file():
        raise ConfigError(
            f"--resume: there is no saved state {file}; a state is written at the end, on Ctrl-C, and every "
            "save_every_n_steps. Train without --resume first, or check output_dir and output_name"
        )
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"--resume: {file} cannot be read ({error}); train without --resume") from error
    now = _identity(settings, loss, features)
    for key, value in now.items():
        if state["settings"].get(key) != value:
            raise ConfigError(
                f"--resume: {file} was saved with {key.removeprefix('ss_')} = {state['settings'].get(key)}, and this "
                f"training has {value}; use the same settings, or train without --resume"
            )
    return state


def _writer(settings: Settings) -> Any:
    if settings.logging_dir is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            f"logging_dir = {settings.logging_dir!r} needs TensorBoard: pip install tensorboard, or remove the line"
        ) from None
    return SummaryWriter(settings.logging_dir)


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C or a termination sets, so that the step under way ends; a second Ctrl-C interrupts it."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_signal(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    earlier = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
