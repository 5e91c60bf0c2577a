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

import inspect
from typing import Any

from torch import Tensor

from freq_loss_plugin import FreqLossConfig, FrequencyLoss, guidance
from freq_loss_plugin.balance import Balance
from freq_loss_plugin.memory import ResidualMemory
from freq_loss_plugin.report import ShareReport
from freq_loss_plugin.step import TermMonitor

from . import report
from .guidance import TokenGuidance
from .host import UnsupportedTrainerError
from .passes import TimestepPasses
from .state import StateFile
from .term import Term, TermMaker
from .trainers import Training, first_step
from .validation import ValidationReport


class LossHook:
    """Adds the frequency term to every training batch of one training.

    Args:
        training: the running training; its trainer must have passed the checks of `host`.
        config: the options. With ``dist_match = 0`` only the metadata are touched.
        network_module: name of the module that made the network, for ``ss_network_module``.
        tokens: the guidance token, where it is on.
    """

    def __init__(
        self, training: Training, config: FreqLossConfig, network_module: str, tokens: TokenGuidance | None = None
    ) -> None:
        self._trainer = training.trainer
        self._args = training.args
        self._config = config
        self._tokens = tokens
        self._network_module = network_module
        self._originals: dict[str, Any] = {}
        self._signatures: dict[str, inspect.Signature] = {}
        # The training batch under way, as process_batch was given it, and its term once there is one.
        self._batch: dict[str, Any] | None = None
        self._validating: dict[str, Any] | None = None  # the same for a validation batch, where it is reported
        self._term: Term | None = None
        self._base_prediction: Tensor | None = None
        memory = ResidualMemory(config) if config.memory else None
        self._balance = Balance(config) if Balance.is_wanted(config) else None
        self._terms = TermMaker(training, config, memory, self._balance)
        self._state = StateFile(config, training.args, memory, self._balance)
        self._validation = ValidationReport(config) if config.validation else None
        self._monitor = TermMonitor()
        self._share = ShareReport(getattr(training.args, "max_train_steps", None), held=bool(config.share))
        self._last_scalars: dict[str, float] = {}
        self._told_of_two_graphs = False
        self.step = first_step(training.args)
        batches = self.step * (getattr(training.args, "gradient_accumulation_steps", None) or 1)
        self._passes = TimestepPasses(training, config, batches)

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
        prediction, self._base_prediction = self._base_prediction, None
        term = self._terms.weighed_against(base_loss, prediction, term)
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
        run = self._originals["get_noise_pred_and_target"]
        if self._config.timesteps == "unified":
            self._term = self._unified_term(call, batch)
            return run(*call.args, **call.kwargs)
        if self._config.timesteps == "shared":
            done = self._passes.shared(run, call, batch["accelerator"])
            self._term = self._terms.compute(batch, done.results, done.timestep, done.sample_mask)
            return done.results
        results = run(*call.args, **call.kwargs)
        self._term = self._terms.compute(batch, results, self._terms.reported_timesteps(batch, results))
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

    def _unified_term(self, call: inspect.BoundArguments, batch: dict[str, Any]) -> Term:
        """The term of an extra pass at one timestep for the batch, propagated where that can be done at once."""
        accelerator = batch["accelerator"]
        done = self._passes.unified(self._originals["get_noise_pred_and_target"], call, accelerator)
        term = self._terms.weighed(self._terms.compute(batch, done.results, done.timestep))
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

    def _validate(self, validation: ValidationReport, call: dict[str, Any], latents: Tensor, results: Any) -> None:
        """Take a validation batch into the report."""
        timesteps = self._terms.reported_timesteps(call, results)
        validation.add(latents, results, self._terms.residual_scale(call, timesteps), timesteps)

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


def _have_a_graph(conditions: Any) -> bool:
    return any(isinstance(each, Tensor) and each.grad_fn is not None for each in conditions)
