"""The loss hook: what happens in a training step of sd-scripts once ``network_module = "kohya_patch"`` is set.

`LossHook.install` replaces five methods on the running trainer *object* (its class and sd-scripts' files stay as they
are). The order of calls in one step:

    process_batch                  the trainer's own
      get_noise_pred_and_target    unified only: first at one t for the batch, in a random stream of its own
        frequency_matching_loss
        backward                   at once, so that the graph of one pass is alive at a time
      get_noise_pred_and_target    the trainer's own pass
        frequency_matching_loss    own and shared: of this pass
    -> base loss + term
    (backward, by sd-scripts; of a unified term only the value is left)
    all_reduce_network             before it: stop if the term was not finite; the weights are still untouched
    (optimizer step, by sd-scripts)
    generate_step_logs             the scalars join the trainer's

Nothing in a step waits for the device: the numbers travel to the host behind the forward pass
(`freq_loss_plugin.step.TermMonitor`) and are read when sd-scripts has queued its backward pass.
"""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freq_loss_plugin import FreqLossConfig, FrequencyLoss, frequency_matching_loss, guidance
from freq_loss_plugin.balance import Balance, DetachedTerm, base_gradient, detached_term
from freq_loss_plugin.latents import PredictionType, residual_scale
from freq_loss_plugin.memory import ResidualMemory
from freq_loss_plugin.report import ShareReport
from freq_loss_plugin.step import (
    TermMonitor,
    separate_random_stream,
    shared_timesteps,
    stream_name,
    unified_timestep,
)

from . import report
from .guidance import TokenGuidance
from .state import StateFile
from .trainers import (
    Training,
    UnsupportedTrainerError,
    at_one_timestep,
    at_timesteps,
    first_step,
    timestep_drawer,
)
from .validation import ValidationReport

# sd-scripts casts its timesteps to the training dtype; bfloat16 has steps of 4 in 512..1000.
_TIMESTEP_TOLERANCE = 4.0


class _Term(NamedTuple):
    """The frequency term of a batch, and what it was computed from.

    ``gradient`` is there where the term is still to be weighed against the base loss, ``logs`` where it was.
    """

    loss: FrequencyLoss
    prediction: Tensor
    target: Tensor
    timesteps: Tensor | float
    gradient: Tensor | None = None
    logs: Mapping[str, Tensor] = MappingProxyType({})


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
        # The training batch under way, as process_batch was given it, and its term once there is one.
        self._batch: dict[str, Any] | None = None
        self._validating: dict[str, Any] | None = None  # the same for a validation batch, where it is reported
        self._term: _Term | None = None
        self._memory = ResidualMemory(config) if config.memory else None
        self._balance = Balance(config) if Balance.is_wanted(config) else None
        self._base_prediction: Tensor | None = None
        self._state = StateFile(config, training.args, self._memory, self._balance)
        self._validation = ValidationReport(config) if config.validation else None
        self._monitor = TermMonitor()
        self._share = ShareReport(getattr(training.args, "max_train_steps", None), held=bool(config.share))
        self._last_scalars: dict[str, float] = {}
        self._schedules: dict[torch.device, Tensor] = {}
        self._timesteps_were_obeyed = False
        self._told_of_two_graphs = False
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
        if self._config.enabled and self._validation is not None:
            replacements["accelerator_logging"] = self._accelerator_logging
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
        self._state.leave()
        del self._trainer._freq_loss_hook

    # What the trainer calls

    def _process_batch(self, *arguments: Any, **named: Any) -> Tensor:
        call = self._bind("process_batch", *arguments, **named)
        original = self._originals["process_batch"]
        if call["args"] is not self._args:
            self.uninstall()  # the trainer object has been given another training
            return original(*arguments, **named)
        if not call["is_train"]:
            self._validating = call if self._validation is not None else None
            result = original(*arguments, **named)
            self._validating = None
            return result
        if self._validation is not None:
            self._validation.discard()
        self._state.save_with(call["accelerator"])
        self._batch = call
        base_loss = original(*arguments, **named)
        term, self._term, self._batch = self._term, None, None
        if term is None:
            raise UnsupportedTrainerError(
                f"{type(self._trainer).__name__}.process_batch did not call get_noise_pred_and_target, in which the "
                "frequency loss finds the prediction; this sd-scripts is newer than this plug-in knows"
            )
        term = self._weighed_against(base_loss, term)
        self._monitor.add(base_loss, term.loss, term.prediction, term.target, term.timesteps, term.logs)
        return base_loss + term.loss.total.to(base_loss.dtype)

    def _get_noise_pred_and_target(self, *arguments: Any, **named: Any) -> Any:
        call = self._signatures["get_noise_pred_and_target"].bind(*arguments, **named)
        if self._tokens is not None:
            given = call.arguments
            given["text_encoder_conds"] = self._tokens.put_in(given["batch"], given["text_encoder_conds"])
        if self._batch is None:
            results = self._originals["get_noise_pred_and_target"](*call.args, **call.kwargs)
            if self._validating is not None and self._validation is not None:
                self._validate(self._validation, self._validating, call.arguments["latents"], results)
            return results
        results = self._training_pass(call, self._batch)
        self._base_prediction = results[0] if self._balance is not None else None
        return results

    def _training_pass(self, call: inspect.BoundArguments, batch: dict[str, Any]) -> Any:
        """The trainer's own pass of a training batch; leaves the batch's term behind."""
        if self._config.timesteps == "unified":
            self._term = self._unified_term(call, batch)
            return self._originals["get_noise_pred_and_target"](*call.args, **call.kwargs)
        if self._config.timesteps == "shared":
            results, timestep = self._pass_at_shared_timesteps(call, batch)
            self._term = self._compute(batch, results, timestep)
            return results
        results = self._originals["get_noise_pred_and_target"](*call.args, **call.kwargs)
        timesteps = self._reported_timesteps(results, batch["accelerator"].device)
        self._term = self._compute(batch, results, timesteps)
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

    def _accelerator_logging(self, *arguments: Any, **named: Any) -> Any:
        assert self._validation is not None
        call = self._signatures["accelerator_logging"].bind(*arguments, **named)
        given = call.arguments
        given["logs"] = self._validation.join(given["accelerator"], given["logs"], given["step_value"])
        return self._originals["accelerator_logging"](*call.args, **call.kwargs)

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

    def _compute(self, call: dict[str, Any], results: Any, timesteps: Tensor | float | None) -> _Term:
        """The term of a pass; 0 where the timesteps are None, which is a batch that shares none in the window."""
        prediction, target, drawn = results[:3]
        batch, device = call["batch"], call["accelerator"].device
        if timesteps is None:
            return _Term(FrequencyLoss(*torch.zeros(3, device=device)), prediction, target, drawn)
        loss_of = functools.partial(
            frequency_matching_loss,
            target=target,
            prediction_type=self._prediction_type,
            timesteps=timesteps,
            alphas_cumprod=self._schedule(call["noise_scheduler"], timesteps),
            sample_weights=_loss_weights(batch, device),
            mask=_mask(batch, self._args, prediction),
            config=self._config,
            memory=self._memory,
            across_processes=True,
        )
        if self._balance is None:
            return _Term(loss_of(prediction), prediction, target, timesteps)
        detached = detached_term(prediction, loss_of)
        return _Term(detached.loss, prediction, target, timesteps, detached.gradient)

    def _weighed_against(self, base_loss: Tensor, term: _Term) -> _Term:
        """The term of a batch whose base loss is there, with the share and the numbers that the options ask for."""
        prediction, self._base_prediction = self._base_prediction, None
        if self._balance is None or prediction is None:
            return term
        if term.gradient is None and (self._balance.share is None or not term.logs):
            return term  # nothing to compare with, or nobody who asks
        beside = base_gradient(base_loss, prediction)
        if beside is None:
            raise UnsupportedTrainerError(
                f"freq_loss_share and freq_loss_grad_cosine: {type(self._trainer).__name__} does not compute its loss "
                "from the prediction that get_noise_pred_and_target returned; leave both out"
            )
        if term.gradient is None:  # it had a pass of its own
            self._balance.observe_base(beside)
            return term
        return self._weighed(self._balance, term, term.gradient, beside, same_pass=True)

    @staticmethod
    def _weighed(balance: Balance, term: _Term, gradient: Tensor, beside: Tensor, *, same_pass: bool) -> _Term:
        loss, logs = balance.weigh(term.prediction, DetachedTerm(term.loss, gradient), beside, same_pass=same_pass)
        return term._replace(loss=loss, logs=logs, gradient=None)

    def _reported_timesteps(self, results: Any, device: torch.device) -> Tensor:
        """Those that the trainer returned, on the scale 0..1000; whole numbers stay what they are."""
        timesteps: Tensor = results[2].to(device)
        return timesteps if self._family.timestep_scale == 1 else timesteps * self._family.timestep_scale

    def _validate(self, validation: ValidationReport, call: dict[str, Any], latents: Tensor, results: Any) -> None:
        """Take a validation batch into the report."""
        timesteps = self._reported_timesteps(results, call["accelerator"].device)
        scale = residual_scale(self._prediction_type, timesteps, self._schedule(call["noise_scheduler"], timesteps))
        validation.add(latents, results, scale, timesteps)

    def _unified_term(self, call: inspect.BoundArguments, batch: dict[str, Any]) -> _Term:
        """The term of an extra pass at one timestep for the batch, propagated where that can be done at once."""
        accelerator = batch["accelerator"]
        results, timestep = self._unified_pass(call, accelerator)
        term = self._compute(batch, results, timestep)
        if term.gradient is not None and self._balance is not None:
            beside = term.prediction.detach().float() - term.target.detach().float()
            term = self._weighed(self._balance, term, term.gradient, beside, same_pass=False)
        if not term.loss.total.requires_grad or not self._propagates_at_once(accelerator):
            return term
        # The graph of a trained text encoder is part of both passes; that of the extra pass ends with this method.
        accelerator.backward(term.loss.total, retain_graph=_have_a_graph(call.arguments["text_encoder_conds"]))
        loss = FrequencyLoss(*(number.detach() for number in term.loss))
        return term._replace(loss=loss, prediction=term.prediction.detach(), target=term.target.detach())

    def _propagates_at_once(self, accelerator: Any) -> bool:
        """DeepSpeed counts backward passes to know when a step is due, so there must be one for each batch."""
        if str(accelerator.distributed_type).rpartition(".")[2] != "DEEPSPEED":
            return True
        if not self._told_of_two_graphs:
            self._told_of_two_graphs = True
            report.tell(report.TWO_GRAPHS)
        return False

    def _unified_pass(self, call: inspect.BoundArguments, accelerator: Any) -> tuple[Any, int]:
        """Run the trainer's own pass once more at one timestep for the batch; the noise differs between processes."""
        seed, number = self._args.seed, self._passes
        self._passes += 1
        timestep = unified_timestep(self._config, seed, number)
        stream = f"{stream_name(seed, number)}:{accelerator.process_index}"
        with separate_random_stream(stream, accelerator.device):
            results = self._call_with(call, at_one_timestep(call.arguments["args"], timestep))
        self._check_timesteps(results[2], [timestep] * len(results[2]))
        return results, timestep

    def _pass_at_shared_timesteps(
        self, call: inspect.BoundArguments, batch: dict[str, Any]
    ) -> tuple[Any, float | None]:
        """The trainer's pass, at one timestep inside the window for the batch, or at several outside it."""
        args, latents = call.arguments["args"], call.arguments["latents"]
        name = f"{stream_name(self._args.seed, self._passes)}:shared"
        self._passes += 1
        draw = timestep_drawer(self._family, args, batch["noise_scheduler"], latents)
        process = batch["accelerator"].process_index
        timesteps, shared = shared_timesteps(draw, len(latents), self._config, name, process)
        with at_timesteps(self._family, args, timesteps, latents.device) as changed:
            results = self._call_with(call, changed)
        self._check_timesteps(results[2], timesteps.tolist())
        return results, shared

    def _call_with(self, call: inspect.BoundArguments, args: argparse.Namespace) -> Any:
        """The trainer's own ``get_noise_pred_and_target`` with other arguments of the training."""
        changed = inspect.BoundArguments(call.signature, {**call.arguments, "args": args})
        return self._originals["get_noise_pred_and_target"](*changed.args, **changed.kwargs)

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

    def _check_timesteps(self, returned: Tensor, asked: list[float]) -> None:
        """Once per training: did the trainer really use the timesteps that it was asked for?"""
        if self._timesteps_were_obeyed:
            return
        found = (returned.detach().float() * self._family.timestep_scale).flatten().tolist()
        if any(abs(one - other) > _TIMESTEP_TOLERANCE for one, other in zip(found, asked, strict=True)):
            raise UnsupportedTrainerError(
                f"asked {type(self._trainer).__name__} for timesteps {asked}, and got {found}: this sd-scripts draws "
                "its timesteps in a way that kohya_patch does not know; set freq_loss_timesteps = 'own'"
            )
        self._timesteps_were_obeyed = True

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


def _have_a_graph(conditions: Any) -> bool:
    return any(isinstance(each, Tensor) and each.grad_fn is not None for each in conditions)


def _mask(batch: Any, args: argparse.Namespace, like: Tensor) -> Tensor | None:
    """The mask by which sd-scripts multiplies its loss, at the size of the latents; None where it uses none."""
    if not getattr(args, "masked_loss", False) and batch.get("alpha_masks") is None:
        return None
    from library.custom_train_functions import apply_masked_loss  # sd-scripts' own rule, so that both agree

    ones = torch.ones(like.shape[0], 1, *like.shape[2:], device=like.device)
    return apply_masked_loss(ones, batch)
