"""The loss hook: what happens in a training step of sd-scripts once ``network_module = "kohya_patch"`` is set.

`LossHook.install` replaces five methods on the running trainer *object* (its class and sd-scripts' files stay as they
are). The order of calls in one step:

    process_batch                  the trainer's own, unchanged -> base loss
      get_noise_pred_and_target    the trainer's own; its arguments and results are kept
    get_noise_pred_and_target      unified only: once more at one t for the batch, in a random stream of its own
    frequency_matching_loss        added to the base loss
    (backward, by sd-scripts)
    all_reduce_network             before it: stop if the term was not finite; the weights are still untouched
    (optimizer step, by sd-scripts)
    generate_step_logs             the scalars join the trainer's

Nothing in a step waits for the device: the numbers travel to the host behind the forward pass
(`freq_loss_plugin.step.TermMonitor`) and are read when sd-scripts has queued its backward pass.
"""

from __future__ import annotations

import argparse
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freq_loss_plugin import FreqLossConfig, FrequencyLoss, frequency_matching_loss, guidance
from freq_loss_plugin.latents import PredictionType
from freq_loss_plugin.report import ShareReport
from freq_loss_plugin.step import TermMonitor, separate_random_stream, stream_name, unified_timestep

from . import report
from .guidance import TokenGuidance
from .trainers import Training, UnsupportedTrainerError, at_one_timestep, first_step

# sd-scripts casts its timesteps to the training dtype; bfloat16 has steps of 4 in 512..1000.
_TIMESTEP_TOLERANCE = 4.0


class _Pass(NamedTuple):
    """One call of ``get_noise_pred_and_target``: what it was given and what it returned."""

    arguments: inspect.BoundArguments
    prediction: Tensor
    target: Tensor
    timesteps: Tensor


class LossHook:
    """Adds the frequency term to every training batch of one training.

    Args:
        training: the running training; its trainer must have passed `trainers.check_trainer`.
        config: the options. With ``dist_match = 0`` only the metadata are touched.
        network_module: name of the module that made the network, for ``ss_network_module``.
        tokens: the guidance token, where it is on.
    """

    def __init__(
        self, training: Training, config: FreqLossConfig, network_module: str, tokens: TokenGuidance | None = None
    ) -> None:
        self._trainer = training.trainer
        self._args = training.args
        self._family = training.family
        self._config = config
        self._tokens = tokens
        self._network_module = network_module
        self._prediction_type: PredictionType = training.family.prediction_type(training.args)
        self._originals: dict[str, Any] = {}
        self._signatures: dict[str, inspect.Signature] = {}
        self._base_pass: _Pass | None = None
        self._keep_pass = False
        self._monitor = TermMonitor()
        self._share = ShareReport(getattr(training.args, "max_train_steps", None))
        self._last_scalars: dict[str, float] = {}
        self._schedules: dict[torch.device, Tensor] = {}
        self._timestep_was_obeyed = False
        self.step = first_step(training.args)
        self._passes = self.step * (getattr(training.args, "gradient_accumulation_steps", None) or 1)

    def install(self) -> None:
        """Replace the methods on the trainer object; a hook of an earlier training on it is taken off first."""
        earlier = vars(self._trainer).get("_freq_loss_hook")
        if earlier is not None:
            earlier.uninstall()
        self._trainer._freq_loss_hook = self
        replacements = {"update_metadata": self._update_metadata}
        if self._config.enabled:
            replacements |= {
                "process_batch": self._process_batch,
                "get_noise_pred_and_target": self._get_noise_pred_and_target,
                "all_reduce_network": self._all_reduce_network,
                "generate_step_logs": self._generate_step_logs,
            }
        if self._tokens is not None:
            replacements |= {
                "get_noise_pred_and_target": self._get_noise_pred_and_target,
                "sample_images": self._sample_images,
            }
        for name, replacement in replacements.items():
            self._originals[name] = getattr(self._trainer, name)
            self._signatures[name] = inspect.signature(self._originals[name])
            setattr(self._trainer, name, replacement)

    def uninstall(self) -> None:
        """Give the trainer its own methods back."""
        for name, original in self._originals.items():
            delattr(self._trainer, name)
            if getattr(self._trainer, name) != original:  # it had one of its own, not its class
                setattr(self._trainer, name, original)
        self._originals.clear()
        del self._trainer._freq_loss_hook

    # What the trainer calls

    def _process_batch(self, *arguments: Any, **named: Any) -> Tensor:
        call = self._bind("process_batch", *arguments, **named)
        original = self._originals["process_batch"]
        if call["args"] is not self._args:
            self.uninstall()  # the trainer object has been given another training
            return original(*arguments, **named)
        if not call["is_train"]:
            return original(*arguments, **named)
        self._keep_pass = True
        base_loss = original(*arguments, **named)
        base_pass, self._base_pass, self._keep_pass = self._base_pass, None, False
        if base_pass is None:
            raise UnsupportedTrainerError(
                f"{type(self._trainer).__name__}.process_batch did not call get_noise_pred_and_target, in which the "
                "frequency loss finds the prediction; this sd-scripts is newer than this plug-in knows"
            )
        term = self._frequency_term(base_pass, base_loss, call)
        return base_loss + term.total.to(base_loss.dtype)

    def _get_noise_pred_and_target(self, *arguments: Any, **named: Any) -> Any:
        original = self._originals["get_noise_pred_and_target"]
        call = self._signatures["get_noise_pred_and_target"].bind(*arguments, **named)
        if self._tokens is None:
            results = original(*arguments, **named)
        else:
            given = call.arguments
            given["text_encoder_conds"] = self._tokens.put_in(given["batch"], given["text_encoder_conds"])
            results = original(*call.args, **call.kwargs)
        if self._keep_pass:
            self._base_pass = _Pass(call, *results[:3])
        return results

    def _sample_images(self, *arguments: Any, **named: Any) -> Any:
        assert self._tokens is not None
        call = self._bind("sample_images", *arguments, **named)
        with self._tokens.while_sampling(call["accelerator"].unwrap_model(call["unet"])):
            return self._originals["sample_images"](*arguments, **named)

    def _all_reduce_network(self, *arguments: Any, **named: Any) -> Any:
        self._settle()
        self.step += 1
        report.tell(self._share.after_step(self.step))
        return self._originals["all_reduce_network"](*arguments, **named)

    def _generate_step_logs(self, *arguments: Any, **named: Any) -> Any:
        logs = self._originals["generate_step_logs"](*arguments, **named)
        self._settle()
        return {**logs, **self._last_scalars}

    def _update_metadata(self, *arguments: Any, **named: Any) -> Any:
        result = self._originals["update_metadata"](*arguments, **named)
        call = self._bind("update_metadata", *arguments, **named)
        if call["args"] is not self._args:
            return result
        metadata = call["metadata"]
        metadata["ss_network_module"] = self._network_module
        if self._config.enabled or self._tokens is not None:
            metadata.update(self._config.file_metadata(self._network_module))
        if self._tokens is not None:
            metadata.update(guidance.file_metadata(self._config.guidance_token, self._tokens.features))
        return result

    # The term

    def _frequency_term(self, base_pass: _Pass, base_loss: Tensor, call: dict[str, Any]) -> FrequencyLoss:
        """The frequency loss of this batch; the monitor gets its numbers."""
        batch, device = call["batch"], call["accelerator"].device
        timesteps: Tensor | float
        if self._config.timesteps == "unified":
            timesteps, used = self._unified_pass(base_pass, call["accelerator"])
        else:
            used = base_pass
            timesteps = used.timesteps.to(device) * self._family.timestep_scale
        term = frequency_matching_loss(
            used.prediction,
            used.target,
            prediction_type=self._prediction_type,
            timesteps=timesteps,
            alphas_cumprod=self._schedule(call["noise_scheduler"], timesteps),
            sample_weights=_loss_weights(batch, device),
            mask=_mask(batch, self._args, used.prediction),
            config=self._config,
        )
        self._monitor.add(base_loss, term, used.prediction, used.target, timesteps)
        return term

    def _unified_pass(self, base_pass: _Pass, accelerator: Any) -> tuple[int, _Pass]:
        """Run the trainer's own pass once more at one timestep for the batch; the noise differs between processes."""
        seed, number = self._args.seed, self._passes
        self._passes += 1
        timestep = unified_timestep(self._config, seed, number)
        stream = f"{stream_name(seed, number)}:{accelerator.process_index}"
        arguments = dict(base_pass.arguments.arguments)
        arguments["args"] = at_one_timestep(arguments["args"], timestep)
        with separate_random_stream(stream, accelerator.device):
            call = inspect.BoundArguments(base_pass.arguments.signature, arguments)
            results = self._originals["get_noise_pred_and_target"](*call.args, **call.kwargs)
        if not self._timestep_was_obeyed:
            self._check_timestep(results[2], timestep)
        return timestep, _Pass(call, *results[:3])

    def _schedule(self, noise_scheduler: Any, timesteps: Tensor | float) -> Tensor | None:
        """alpha_bar where the timesteps are: sd-scripts moves its own copy between CPU and GPU in every step."""
        if self._family.prediction != "scheduler":
            return None
        device = timesteps.device if isinstance(timesteps, Tensor) else torch.device("cpu")
        if device not in self._schedules:
            schedule = getattr(noise_scheduler, "alphas_cumprod", None)
            if schedule is None:
                raise UnsupportedTrainerError(
                    f"{type(self._trainer).__name__} uses {type(noise_scheduler).__name__}, which has no "
                    "alphas_cumprod: it is not one of the trainers that kohya_patch knows how to read"
                )
            self._schedules[device] = schedule.detach().to(device=device, dtype=torch.float32)
        return self._schedules[device]

    def _check_timestep(self, returned: Tensor, asked: int) -> None:
        """Once per training: did the trainer really use the timestep that it was asked for?"""
        found = (returned.detach().float() * self._family.timestep_scale).flatten().tolist()
        if any(abs(timestep - asked) > _TIMESTEP_TOLERANCE for timestep in found):
            raise UnsupportedTrainerError(
                f"asked {type(self._trainer).__name__} for timestep {asked}, and got {found}: this sd-scripts draws "
                "its timesteps in a way that kohya_patch does not know; set freq_loss_timesteps = 'own'"
            )
        self._timestep_was_obeyed = True

    # What the user sees of it

    def _settle(self) -> None:
        """Read the numbers that have arrived since the last call; raises NonFiniteLossError where one is not finite."""
        for numbers in self._monitor.settle(self.step + 1):
            self._share.add(numbers.share)
            self._last_scalars = numbers.logs()

    def _bind(self, name: str, *arguments: Any, **named: Any) -> dict[str, Any]:
        bound = self._signatures[name].bind(*arguments, **named)
        bound.apply_defaults()
        return bound.arguments


def _loss_weights(batch: Any, device: torch.device) -> Tensor | None:
    """sd-scripts' weight of each sample: prior_loss_weight for regularisation images, otherwise 1."""
    weights = batch.get("loss_weights")
    return None if weights is None else weights.to(device, non_blocking=True)


def _mask(batch: Any, args: argparse.Namespace, like: Tensor) -> Tensor | None:
    """The mask by which sd-scripts multiplies its loss, at the size of the latents; None where it uses none."""
    if not getattr(args, "masked_loss", False) and batch.get("alpha_masks") is None:
        return None
    from library.custom_train_functions import apply_masked_loss  # sd-scripts' own rule, so that both agree

    ones = torch.ones(like.shape[0], 1, *like.shape[2:], device=like.device)
    return apply_masked_loss(ones, batch)
