"""The loss hook in musubi-tuner. The order of calls in one step:

    process_batch                            the trainer's own; image quality: with latents of defective images restored
      FrequencyTerm.plan
      get_noisy_model_input_and_timesteps    unified only: first at one t for the batch, in a random stream of its own
      call_dit
        FrequencyTerm.extra_pass             propagated at once, so that the graph of one pass is alive at a time
      get_noisy_model_input_and_timesteps    the trainer's own pass
        FrequencyTerm.choose                   shared, image quality: the timesteps, not those that the trainer drew
      call_dit
        FrequencyTerm.balance                its prediction, filtered
      compute_loss                           the trainer's own
    FrequencyTerm.join                       base loss + term
    (backward, by musubi-tuner)
    optimizer.step                           before it, FrequencyTerm.settle: stop if the term was not finite
    extra_step_logs                          the scalars join the trainer's

Latents of videos have shape (B, C, T, H, W), those of Kandinsky (B, T, C, H, W): bands are of each H × W plane.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.training.loss_balance import Balanced
from freq_loss_plugin.training.passes import Pass, Plan
from freq_loss_plugin.training.random_streams import separate_random_stream

from ..hook import Hook
from ..host import UnsupportedTrainerError
from ..image_quality import ImageQuality
from ..protocols import Handle
from . import timesteps
from .host import MUSUBI
from .trainers import TrainingRun

_NOISY, _PASS = "get_noisy_model_input_and_timesteps", "call_dit"


class LossHook(Hook):
    """See `kohya_patch.hook.Hook`. A resumed run counts its steps from 0, as musubi-tuner does.

    Args:
        run: see there.
        config: see there.
        network_module: see there.
        quality: see there.
    """

    def __init__(
        self, run: TrainingRun, config: FreqLossConfig, network_module: str, quality: ImageQuality | None = None
    ) -> None:
        super().__init__(run, config, network_module, quality)
        # Of the current batch: whether its own pass is being made, how often that chose timesteps, its plan, and what
        # came of it.
        self._is_base_pass = False
        self._choices = 0
        self._plan: Plan | None = None
        self._passed: Pass | None = None
        self._step_has_ended = False
        self._before_step: Handle | None = None

    def replacements(self) -> dict[str, Callable[..., Any]]:
        """See `Hook.replacements`."""
        replaced: dict[str, Callable[..., Any]] = {"extra_metadata": self._extra_metadata}
        if self._config.changes_training:
            replaced |= {
                "process_batch": self._process_batch,
                _NOISY: self._get_noisy_model_input_and_timesteps,
                _PASS: self._call_dit,
                "on_train_start": self._on_train_start,
                "on_post_optimizer_step": self._on_post_optimizer_step,
                "extra_step_logs": self._extra_step_logs,
            }
        return replaced

    def uninstall(self) -> None:
        """Give the trainer its own methods back."""
        super().uninstall()
        if self._before_step is not None:
            self._before_step.remove()

    # What the trainer calls

    def _process_batch(self, *arguments: Any, **named: Any) -> tuple[Tensor, dict[str, float]]:
        process_batch = self._methods.original("process_batch")
        bound = self._methods.bind("process_batch", *arguments, **named)
        call = bound.arguments
        if call["args"] is not self._args:
            self.uninstall()  # the trainer object is now used for another run
            return process_batch(*arguments, **named)
        self._begin_batch(call["accelerator"])
        least = None
        if self._quality is not None:
            least = self._quality.least_of(call["batch"])
            _replace_latents(call, self._quality.restored(call["batch"], call["latents"]))
        self._plan = self.term.plan(least)
        if self._plan.extra is not None:
            self._extra_pass(call, self._plan)
        self._is_base_pass, self._choices = True, 0
        try:
            base_loss, metrics = process_batch(*bound.args, **bound.kwargs)
        finally:
            self._is_base_pass = False
        passed, self._passed = self._passed, None
        if passed is None:
            raise UnsupportedTrainerError(
                f"{type(self._trainer).__name__}.process_batch did not call {_PASS}, in which the frequency loss finds "
                "the prediction; this musubi-tuner is newer than this plug-in knows"
            )
        if self._plan.chooses and self._choices != 1:
            raise MUSUBI.unsupported(type(self._trainer), f"one call of {_NOISY} in a batch", str(self._choices))
        return self.term.join(passed, base_loss), metrics

    def _get_noisy_model_input_and_timesteps(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        method = self._methods.original(_NOISY)
        if not self._is_base_pass or self._plan is None or not self._plan.chooses:
            return method(*arguments, **named)
        self._choices += 1
        given = self._methods.bind(_NOISY, *arguments, **named).arguments
        return timesteps.chosen(method, given, self.term.choose, self._plan.own_stream)

    def _call_dit(self, *arguments: Any, **named: Any) -> Any:
        output = self._methods.original(_PASS)(*arguments, **named)
        if not self._is_base_pass:
            return output
        call = self._methods.bind(_PASS, *arguments, **named).arguments
        self._passed = Pass(output.pred, output.target, timesteps.on_scale(call["timesteps"], self._args))
        balanced = self.term.balance(self._passed)
        return dataclasses.replace(output, pred=_weighed(balanced, output.target))

    def _extra_pass(self, call: dict[str, Any], plan: Plan) -> None:
        assert plan.extra is not None
        accelerator, latents = call["accelerator"], call["latents"]
        with separate_random_stream(plan.own_stream, accelerator.device):
            noise = torch.randn_like(latents)
            given = {"args": self._args, "noise": noise, "latents": latents, "timesteps": None}
            given |= {"noise_scheduler": call["noise_scheduler"], "device": accelerator.device}
            given["dtype"] = call["dit_dtype"]
            noisy, at, fixed = timesteps.at(self._methods.original(_NOISY), given, float(plan.extra), plan.stream)
            transformer, batch, dtype = call["transformer"], call["batch"], call["network_dtype"]
            output = self._methods.original(_PASS)(
                fixed, accelerator, transformer, latents, batch, noise, noisy, at, dtype
            )
        self.term.extra_pass(Pass(output.pred, output.target, plan.extra), accelerator.backward)

    def _on_train_start(self, *arguments: Any, **named: Any) -> Any:
        result = self._methods.original("on_train_start")(*arguments, **named)
        optimizer = self._methods.bind("on_train_start", *arguments, **named).arguments["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's has the one that is stepped
        self._before_step = optimizer.register_step_pre_hook(self._settle_before_step)
        return result

    def _settle_before_step(self, *_: Any) -> None:
        self._step_has_ended = True
        self._end_step()

    def _on_post_optimizer_step(self, *arguments: Any, **named: Any) -> Any:
        call = self._methods.bind("on_post_optimizer_step", *arguments, **named).arguments
        if call["sync_gradients"] and not self._step_has_ended:
            self._end_step()  # a scaler has skipped the step
        self._step_has_ended = False
        return self._methods.original("on_post_optimizer_step")(*arguments, **named)

    def _extra_step_logs(self, *arguments: Any, **named: Any) -> dict[str, Any]:
        return {**self._methods.original("extra_step_logs")(*arguments, **named), **self._logs}

    def _extra_metadata(self, *arguments: Any, **named: Any) -> dict[str, Any]:
        metadata = self._methods.original("extra_metadata")(*arguments, **named)
        call = self._methods.bind("extra_metadata", *arguments, **named).arguments
        return {**metadata, **self._metadata()} if call["args"] is self._args else metadata


def _replace_latents(call: dict[str, Any], latents: Tensor) -> None:
    """Those of a call of process_batch, and of its batch: where they are not scaled, some trainers take them there."""
    if call["batch"]["latents"] is call["latents"]:
        call["batch"] = {**call["batch"], "latents": latents}
    call["latents"] = latents


def _weighed(balanced: Balanced, target: Tensor) -> Tensor:
    """The prediction whose mean squared error is the balanced loss: the trainer reduces it to one number at once."""
    prediction, weights = balanced
    if weights is None:
        return prediction
    target = target.to(weights.dtype)
    roots = weights.sqrt().view(-1, *(1,) * (target.ndim - 1))
    return target + roots * (prediction.to(target.dtype) - target)
