"""The loss hook: what happens in a training step of sd-scripts once ``network_module = "kohya_patch"`` is set.

The order of calls in one step:

    process_batch                  the trainer's own
      FrequencyTerm.plan
      get_noise_pred_and_target    image quality: with the latents of defective images restored
                                   unified only: first at one t for the batch, in a random stream of its own
        FrequencyTerm.extra_pass     propagated at once, so that the graph of one pass is alive at a time
      get_noise_pred_and_target    the trainer's own pass
        FrequencyTerm.choose         shared, image quality: the timesteps, in place of those that the trainer drew
    FrequencyTerm.join             base loss + term; of a unified term only the value is left
    (backward, by sd-scripts)
    all_reduce_network             before it, FrequencyTerm.settle: stop if the term was not finite
    (optimizer step, by sd-scripts)
    generate_step_logs             the scalars join the trainer's

Nothing in a step waits for the device: the numbers travel to the host behind the forward pass
(`freq_loss_plugin.training.monitor.TermMonitor`) and are read when sd-scripts has queued its backward pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.guidance_token import features as guidance
from freq_loss_plugin.training.loss_balance import Balanced
from freq_loss_plugin.training.passes import Pass, Plan

from ..hook import Hook
from ..host import UnsupportedTrainerError
from ..image_quality import ImageQuality
from .batch import BatchReader
from .guidance import TokenGuidance
from .passes import TimestepPasses
from .trainers import TrainingRun, first_step
from .validation import ValidationReport

_PASS = "get_noise_pred_and_target"


class LossHook(Hook):
    """See `kohya_patch.hook.Hook`.

    Args:
        run: see there.
        config: see there.
        network_module: see there.
        tokens: the guidance token, where it is on.
        quality: see there.
    """

    def __init__(
        self,
        run: TrainingRun,
        config: FreqLossConfig,
        network_module: str,
        tokens: TokenGuidance | None = None,
        quality: ImageQuality | None = None,
    ) -> None:
        super().__init__(run, config, network_module, quality, first_step(run.args))
        self._tokens = tokens
        self._batches = BatchReader(run)
        self._passes = TimestepPasses(run, config)
        validation = self.term.validation
        self._validation = ValidationReport(config, validation) if validation is not None else None
        # The arguments of process_batch, for the current training batch, or validation batch if that is logged.
        self._training_call: dict[str, Any] | None = None
        self._validation_call: dict[str, Any] | None = None
        self._passed: Pass | None = None
        self._balanced: Balanced | None = None

    def replacements(self) -> dict[str, Callable[..., Any]]:
        """See `Hook.replacements`."""
        replaced: dict[str, Callable[..., Any]] = {"update_metadata": self._update_metadata}
        if self._config.changes_training:
            replaced |= {
                "process_batch": self._process_batch,
                _PASS: self._get_noise_pred_and_target,
                "all_reduce_network": self._all_reduce_network,
                "generate_step_logs": self._generate_step_logs,
            }
        if self._config.balanced or self._config.gated:
            replaced["post_process_loss"] = self._post_process_loss
        if self._config.enabled and self._validation is not None:
            replaced["accelerator_logging"] = self._accelerator_logging
        if self._tokens is not None:
            replaced |= {_PASS: self._get_noise_pred_and_target, "sample_images": self._sample_images}
        return replaced

    # What the trainer calls

    def _process_batch(self, *arguments: Any, **named: Any) -> Tensor:
        call = self._methods.bind("process_batch", *arguments, **named).arguments
        process_batch = self._methods.original("process_batch")
        if call["args"] is not self._args:
            self.uninstall()  # the trainer object is now used for another run
            return process_batch(*arguments, **named)
        if not call["is_train"]:
            self._validation_call = call if self._validation is not None else None
            result: Tensor = process_batch(*arguments, **named)
            self._validation_call = None
            return result
        if self._validation is not None:
            self._validation.discard()
        self._begin_batch(call["accelerator"])
        self._training_call = call
        base_loss = process_batch(*arguments, **named)
        passed, self._passed, self._training_call, self._balanced = self._passed, None, None, None
        if passed is None:
            raise UnsupportedTrainerError(
                f"{type(self._trainer).__name__}.process_batch did not call {_PASS}, in which the frequency loss finds "
                "the prediction; this sd-scripts is newer than this plug-in knows"
            )
        return self.term.join(passed, base_loss)

    def _get_noise_pred_and_target(self, *arguments: Any, **named: Any) -> Any:
        call = self._methods.bind(_PASS, *arguments, **named)
        if self._tokens is not None:
            given = call.arguments
            given["text_encoder_conds"] = self._tokens.replace_tokens(given["batch"], given["text_encoder_conds"])
        if self._training_call is not None:
            return self._training_pass(call, self._training_call)
        results = self._methods.original(_PASS)(*call.args, **call.kwargs)
        if self._validation_call is not None:
            self.term.validate(self._batches.read(self._validation_call, results), call.arguments["latents"])
        return results

    def _training_pass(self, call: inspect.BoundArguments, batch: dict[str, Any]) -> Any:
        """The trainer's own pass of a training batch, which it leaves in ``_passed``."""
        forward, least = self._methods.original(_PASS), None
        if self._quality is not None:
            least, given = self._quality.least_of(batch["batch"]), call.arguments
            given["latents"] = self._quality.restored(batch["batch"], given["latents"])
        plan = self.term.plan(least)
        if plan.extra is not None:
            self._extra_pass(call, batch, plan)
        if plan.chooses:
            results = self._passes.chosen(forward, call, self.term.choose, plan.own_stream)
        else:
            results = forward(*call.args, **call.kwargs)
        self._passed = self._batches.read(batch, results)
        self._balanced = self.term.balance(self._passed)
        return (self._balanced.prediction, *results[1:])

    def _extra_pass(self, call: inspect.BoundArguments, batch: dict[str, Any], plan: Plan) -> None:
        assert plan.extra is not None
        accelerator = batch["accelerator"]
        results = self._passes.extra(self._methods.original(_PASS), call, accelerator, plan)
        passed = self._batches.read(batch, results)._replace(timesteps=plan.extra)
        # The graph of a trained text encoder is part of both passes; that of the extra pass ends with this method.
        shares_graph = _have_a_graph(call.arguments["text_encoder_conds"])
        self.term.extra_pass(passed, functools.partial(accelerator.backward, retain_graph=shares_graph))

    def _post_process_loss(self, *arguments: Any, **named: Any) -> Any:
        """The losses of the samples, weighted by noise level; validation has no weights here."""
        losses = self._methods.original("post_process_loss")(*arguments, **named)
        weights = None if self._balanced is None else self._balanced.weights
        return losses if weights is None else losses * weights

    def _sample_images(self, *arguments: Any, **named: Any) -> Any:
        assert self._tokens is not None
        call = self._methods.bind("sample_images", *arguments, **named).arguments
        with self._tokens.while_sampling(call["accelerator"].unwrap_model(call["unet"])):
            return self._methods.original("sample_images")(*arguments, **named)

    def _all_reduce_network(self, *arguments: Any, **named: Any) -> Any:
        self._end_step()
        return self._methods.original("all_reduce_network")(*arguments, **named)

    def _generate_step_logs(self, *arguments: Any, **named: Any) -> Any:
        logs = self._methods.original("generate_step_logs")(*arguments, **named)
        return {**logs, **self._logs}

    def _accelerator_logging(self, *arguments: Any, **named: Any) -> Any:
        assert self._validation is not None
        call = self._methods.bind("accelerator_logging", *arguments, **named)
        given = call.arguments
        given["logs"] = self._validation.join(given["accelerator"], given["logs"], given["step_value"])
        return self._methods.original("accelerator_logging")(*call.args, **call.kwargs)

    def _update_metadata(self, *arguments: Any, **named: Any) -> Any:
        result = self._methods.original("update_metadata")(*arguments, **named)
        call = self._methods.bind("update_metadata", *arguments, **named).arguments
        if call["args"] is not self._args:
            return result
        metadata = call["metadata"]
        metadata.update(self._metadata())
        if self._tokens is not None:
            metadata.update(guidance.file_metadata(self._config.guidance_token, self._tokens.features))
        return result


def _have_a_graph(conditions: Any) -> bool:
    return any(isinstance(condition, Tensor) and condition.grad_fn is not None for condition in conditions)
