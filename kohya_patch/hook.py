"""The loss hook: what happens in a training step of sd-scripts once ``network_module = "kohya_patch"`` is set.

`LossHook.install` replaces methods of the running trainer *object*, those that the options need; its class and
sd-scripts' files stay as they are. The order of calls in one step:

    process_batch                  the trainer's own
      FrequencyTerm.plan           shared: while the trainer's pass draws its timesteps
      get_noise_pred_and_target    unified only: first at one t for the batch, in a random stream of its own
        FrequencyTerm.extra_pass     propagated at once, so that the graph of one pass is alive at a time
      get_noise_pred_and_target    the trainer's own pass; no image below its least timestep
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
from typing import Any

from torch import Tensor

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.guidance_token import features as guidance
from freq_loss_plugin.image_quality.survey import SUMMARY_KEY
from freq_loss_plugin.training.loss_balance import Balanced
from freq_loss_plugin.training.messages import Message
from freq_loss_plugin.training.passes import Pass, Plan, stream_above
from freq_loss_plugin.training.term import FrequencyTerm

from . import report
from .batch import BatchReader
from .guidance import TokenGuidance
from .host import UnsupportedTrainerError
from .image_quality import ImageQuality
from .passes import TimestepPasses
from .patching import PatchedMethods
from .protocols import Accelerator
from .state import StateFile
from .trainers import TrainingRun, first_step, process_index
from .validation import ValidationReport

_PASS = "get_noise_pred_and_target"


class LossHook:
    """Adds the frequency term to every training batch of one run.

    Args:
        run: the run in progress; its trainer must have passed the checks of `host`.
        config: the options. With ``dist_match = 0`` only the metadata are touched.
        network_module: name of the module that made the network, for ``ss_network_module``.
        tokens: the guidance token, where it is on.
        quality: of the training images, where they train by it.
    """

    def __init__(
        self,
        run: TrainingRun,
        config: FreqLossConfig,
        network_module: str,
        tokens: TokenGuidance | None = None,
        quality: ImageQuality | None = None,
    ) -> None:
        self._trainer, self._args = run.trainer, run.args
        self._config, self._network_module, self._tokens, self._quality = config, network_module, tokens, quality
        self._methods = PatchedMethods(run.trainer)
        self.step = first_step(run.args)
        self.term = _make_term(run, config, self.step)
        self._batches = BatchReader(run)
        self._passes = TimestepPasses(run, config)
        self._state = StateFile(config, run.args, self.term)
        validation = self.term.validation
        self._validation = ValidationReport(config, validation) if validation is not None else None
        # The arguments of process_batch, for the current training batch, or validation batch if that is logged.
        self._training_call: dict[str, Any] | None = None
        self._validation_call: dict[str, Any] | None = None
        self._passed: Pass | None = None
        self._balanced: Balanced | None = None
        self._draws_balance = config.balanced
        self._accelerator: Accelerator | None = None
        self._logs: dict[str, float] = {}

    def install(self) -> None:
        """Replace the methods on the trainer object; the hook of an earlier run is removed first."""
        earlier = vars(self._trainer).get("_freq_loss_hook")
        if earlier is not None:
            earlier.uninstall()
        self._trainer._freq_loss_hook = self
        replacements = {"update_metadata": self._update_metadata}
        if self._config.changes_training:
            replacements |= {
                "process_batch": self._process_batch,
                _PASS: self._get_noise_pred_and_target,
                "all_reduce_network": self._all_reduce_network,
                "generate_step_logs": self._generate_step_logs,
            }
        if self._config.balanced:
            replacements["post_process_loss"] = self._post_process_loss
        if self._config.enabled and self._validation is not None:
            replacements["accelerator_logging"] = self._accelerator_logging
        if self._tokens is not None:
            replacements |= {_PASS: self._get_noise_pred_and_target, "sample_images": self._sample_images}
        for name, replacement in replacements.items():
            self._methods.replace(name, replacement)

    def uninstall(self) -> None:
        """Give the trainer its own methods back."""
        self._methods.restore()
        self._state.remove()
        del self._trainer._freq_loss_hook

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
        self._accelerator = call["accelerator"]
        self._state.save_with(self._accelerator)
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
        forward = self._methods.original(_PASS)
        least = None if self._quality is None else self._quality.least_of(batch["batch"])
        if self._config.enabled and self._config.timesteps == "shared":
            results = self._passes.shared(forward, call, functools.partial(self.term.plan, least=least))
        else:
            plan = self.term.plan(len(call.arguments["latents"]), least=least)
            if plan.extra is not None:
                self._extra_pass(call, batch, plan)
            if least is None:
                results = forward(*call.args, **call.kwargs)
            else:
                results = self._passes.above(forward, call, least, stream_above(plan, process_index()))
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
        """The losses of the samples, weighted by noise level; validation and ``band`` have no weights here."""
        losses = self._methods.original("post_process_loss")(*arguments, **named)
        weights = None if self._balanced is None else self._balanced.weights
        return losses if weights is None else losses * weights

    def _sample_images(self, *arguments: Any, **named: Any) -> Any:
        assert self._tokens is not None
        call = self._methods.bind("sample_images", *arguments, **named).arguments
        with self._tokens.while_sampling(call["accelerator"].unwrap_model(call["unet"])):
            return self._methods.original("sample_images")(*arguments, **named)

    def _all_reduce_network(self, *arguments: Any, **named: Any) -> Any:
        self._settle()
        self.step += 1
        return self._methods.original("all_reduce_network")(*arguments, **named)

    def _generate_step_logs(self, *arguments: Any, **named: Any) -> Any:
        logs = self._methods.original("generate_step_logs")(*arguments, **named)
        return {**logs, **self._logs}

    def _settle(self) -> None:
        """Read the numbers of the step; raises NonFiniteLossError where one is not finite."""
        metrics = self.term.settle(self.step + 1)
        if metrics is not None:
            self._logs = metrics.logs(has_term=self._config.enabled)
            report.log(metrics.message)
            if self._draws_balance:
                self._draw_balance()

    def _draw_balance(self) -> None:
        assert self._accelerator is not None
        try:
            report.log_image(self._accelerator, "loss/balance_weights", self.term.balance_plot, self.step + 1)
        except ImportError as error:
            self._draws_balance = False
            report.log(Message(f"freq_loss_balance: numbers without the image of the weights; {error}", True))

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
        metadata["ss_network_module"] = self._network_module
        if self._config.changes_training or self._tokens is not None:
            metadata.update(self._config.file_metadata(self._network_module))
        if self._quality is not None:
            metadata[SUMMARY_KEY] = self._quality.survey.summary
        if self._tokens is not None:
            metadata.update(guidance.file_metadata(self._config.guidance_token, self._tokens.features))
        return result


def _make_term(run: TrainingRun, config: FreqLossConfig, step: int) -> FrequencyTerm:
    args = run.args
    return FrequencyTerm(
        config,
        run.family.prediction_type(args),
        seed=getattr(args, "seed", None),
        first_batch=step * (getattr(args, "gradient_accumulation_steps", None) or 1),
        process=process_index(),
        max_train_steps=getattr(args, "max_train_steps", None),
    )


def _have_a_graph(conditions: Any) -> bool:
    return any(isinstance(condition, Tensor) and condition.grad_fn is not None for condition in conditions)
