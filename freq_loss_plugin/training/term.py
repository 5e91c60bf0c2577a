"""The frequency term of a training run, the same object in every trainer; it never calls a model.

A trainer goes through these calls with every batch, and `settle` before every optimizer step:

    plan = term.plan()                    whether the batch has an extra pass, and at which timestep
    term.extra_pass(passed, backward)     unified: what the extra pass returned
    timesteps = term.choose(draws)        where the plan says so: the timesteps of the base pass
    balanced = term.balance(passed)       what the base loss is computed from
    loss = term.join(passed, base_loss)   what the base pass returned; the loss to propagate
    metrics = term.settle(step)           the numbers; raises where one of them is not finite
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..loss.latents import PredictionType, residual_scale
from ..loss.matching import frequency_matching_loss
from ..loss.params import FrequencyLoss
from ..options.config import FreqLossConfig
from .distributed import Parts, add_nothing, gather_parts, sum_over_processes
from .gradient_balance import GradientBalance, GradientRatio, base_gradient, detached_term, mse_gradient
from .least_timesteps import TimestepPools, raised
from .loss_balance import Balanced, LossBalance
from .messages import FractionReport
from .monitor import StepMetrics, TermMonitor
from .passes import Pass, Plan
from .random_streams import stream_name
from .timesteps import Draws, coupled_timesteps, shared_timesteps, unified_timestep
from .update_shares import UpdateShares
from .validation import ValidationBands


class _Term(NamedTuple):
    """The term of a pass as it joins the base loss, its pass, and what is logged of it."""

    loss: FrequencyLoss
    passed: Pass
    logs: Mapping[str, Tensor] = MappingProxyType({})


class FrequencyTerm:
    """Adds the frequency term to the base loss, batch by batch.

    Args:
        config: the options; with ``dist_match`` = 0 nothing is added, and the numbers are those of the base loss.
        prediction_type: what the model predicts; see `freq_loss_plugin.loss.latents`.
        seed: the seed of the run, on which the timesteps of extra passes depend; the same in all processes.
        first_batch: how many batches a resumed run has behind it.
        process: the number of this process.
        max_train_steps: the length of the run, where it is known.
        least: how many samples of an epoch have each least timestep, where some have one.
    """

    def __init__(
        self,
        config: FreqLossConfig,
        prediction_type: PredictionType,
        *,
        seed: int | None,
        first_batch: int = 0,
        process: int = 0,
        max_train_steps: int | None = None,
        least: Mapping[int, int] | None = None,
    ) -> None:
        self.config, self._prediction_type = config, prediction_type
        self._seed, self._batch, self._process = seed, first_batch, process
        self._plan = Plan("", "")
        self._pools = TimestepPools(f"{stream_name(seed, -1)}:pool", max(least or (0,)))
        may = prediction_type != "epsilon"
        self._shares = UpdateShares(least, self._pools) if may and least and any(least) else None
        self._extra: _Term | None = None
        self._balance = GradientBalance(config) if GradientBalance.is_wanted(config) else None
        self._loss_balance = LossBalance(config) if config.balanced else None
        self._monitor = TermMonitor()
        self._fraction = FractionReport(max_train_steps, ratio_is_fixed=bool(config.gradient_ratio))
        self._schedules: dict[torch.device, Tensor] = {}
        self.validation = ValidationBands(config) if config.validation else None

    def plan(self, least: Tensor | None = None) -> Plan:
        """Begin the next batch.

        Args:
            least: the samples' least timesteps, shape (B,), on the CPU; None where there are none. The term is computed
                from those samples that may train at its timestep.
        """
        name = stream_name(self._seed, self._batch)
        self._batch += 1
        mode = self.config.timesteps if self.config.enabled else None
        chooses = mode == "shared" or least is not None or self._shares is not None
        plan = Plan(name, f"{name}:{self._process}", least=least, chooses=chooses)
        if mode == "unified":
            plan = plan.with_extra_pass(unified_timestep(self.config, name))
        self._plan = plan._replace(has_term=mode == "own")
        return self._plan

    def choose(self, draws: Draws) -> Tensor:
        """The timesteps of the base pass, shape (B,): one that the batch shares, and none below its sample's least.

        To be called once where the plan ``chooses``.

        Args:
            draws: how the trainer draws the timesteps of this batch.
        """
        timesteps, plan = draws.own, self._plan
        if self.config.enabled and self.config.timesteps == "shared":
            timesteps, plan = self._share(draws)
        if plan.least is not None:
            above = self._pools.above(plan.least, draws, f"{plan.own_stream}:above")
            timesteps = raised(timesteps, plan.least, above)
        if self._shares is not None:
            plan = plan._replace(weights=self._shares.weights(timesteps, draws))
        self._plan = plan
        return timesteps

    @property
    def has_term(self) -> bool:
        """Whether the current batch has a frequency term, in a pass of its own or, after `choose`, in the base pass."""
        return self._plan.has_term or self._plan.extra is not None

    def balance(self, passed: Pass) -> Balanced:
        """The prediction and sample weights of a base loss; see `LossBalance` and `UpdateShares`."""
        balance, weights = self._loss_balance, self._plan.weights
        balanced = Balanced(passed.prediction) if balance is None else balance.balance(passed)
        if weights is None:
            return balanced
        weights = weights.to(passed.prediction.device, non_blocking=True)
        return balanced._replace(weights=weights if balanced.weights is None else weights * balanced.weights)

    def balance_plot(self) -> Tensor | None:
        """After `settle`: now and then an image of the balance's weights; see `LossBalance.plot`."""
        return None if self._loss_balance is None else self._loss_balance.plot()

    def extra_pass(self, passed: Pass, backward: Callable[[Tensor], None]) -> None:
        """Take the extra pass of ``unified``, and propagate its term at once, so that one graph is alive at a time."""
        passed = self._of_counted_samples(passed)
        reference = functools.partial(mse_gradient, passed.prediction, passed.target)
        term = self._weighed(passed, reference, gather_parts(passed.prediction), same_pass=False)
        if term.loss.total.requires_grad:
            backward(term.loss.total)
        self._extra = _Term(FrequencyLoss(*(number.detach() for number in term.loss)), passed.detached(), term.logs)

    def join(self, passed: Pass, base_loss: Tensor) -> Tensor:
        """The base loss plus the term: of this pass, or, where there was an extra pass, the value of that one's.

        Raises:
            ValueError: gradients are to be compared, and the base loss was not computed from ``passed.prediction``.
        """
        term, self._extra = self._extra, None
        if term is not None:
            if self._balance is not None and self._balance.ratio is not None:
                self._balance.observe_base(base_gradient(base_loss, passed.prediction))
        else:
            term = self._term_of_base_pass(passed, base_loss)
        logs = dict(term.logs)
        if self._loss_balance is not None:
            logs["balance_unweighted"] = F.mse_loss(passed.prediction.detach().float(), passed.target.detach().float())
        self._monitor.add(base_loss, term.loss, term.passed, logs)
        return base_loss + term.loss.total.to(base_loss.dtype)

    def settle(self, step: int) -> StepMetrics | None:
        """The mean numbers of the batches since the last call, before the optimizer runs; None where there were none.

        Args:
            step: the number of the current step, counted from 1.

        Raises:
            NonFiniteLossError: the term of one of the batches is NaN or infinite.
        """
        batches = self._monitor.settle(step)
        if not batches:
            return None
        metrics = StepMetrics.mean(batches)
        message = self._fraction.add_step(step, metrics.fraction) if self.config.enabled else None
        return metrics._replace(message=message)

    @torch.no_grad()
    def evaluate(self, passed: Pass) -> FrequencyLoss:
        """The term of a pass by itself: without other processes or a gradient."""
        return self._loss(passed, passed.prediction)

    def validate(self, passed: Pass, clean: Tensor) -> None:
        """Take a validation pass of the clean latents ``clean`` into `validation`."""
        assert self.validation is not None
        schedule = self._schedule(passed)
        scale = residual_scale(self._prediction_type, passed.timesteps, schedule)
        self.validation.add(clean, passed.prediction - passed.target, scale, passed.timesteps)

    @property
    def keeps_state(self) -> bool:
        """Whether anything is carried from batch to batch, which a resumed run needs."""
        return bool(self._kept())

    def state_dict(self) -> dict[str, Tensor]:
        """The averages of the gradient ratio and of the balance, on the CPU, by name."""
        return {
            f"{part}.{key}": value for part, kept in self._kept().items() for key, value in kept.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> list[str]:
        """Continue with what `state_dict` returned; the names of the parts that it lacks and that begin anew."""
        missing = []
        for part, kept in self._kept().items():
            own = {key.partition(".")[2]: value for key, value in state.items() if key.partition(".")[0] == part}
            if not own or not kept.load_state_dict(own):
                missing.append(part)
        return missing

    def _kept(self) -> dict[str, GradientRatio | LossBalance]:
        ratio = self._balance.ratio if self._balance is not None else None
        parts = {"gradient_ratio": ratio, "balance": self._loss_balance}
        return {name: part for name, part in parts.items() if part is not None}

    def _share(self, draws: Draws) -> tuple[Tensor, Plan]:
        """Timesteps of a batch that shares one in the window, before any is raised, and the plan with their term."""
        plan, stream = self._plan, f"{self._plan.stream}:shared"
        counted = None
        if draws.per_sample is None:
            timesteps, shared = shared_timesteps(draws.draw, len(draws.own), self.config, stream, self._process)
        else:
            timesteps, shared, counted = coupled_timesteps(
                draws.draw, draws.per_sample, self.config, stream, self._process
            )
        if plan.least is not None and shared is not None:
            may = plan.least <= shared
            counted = may if counted is None else may & counted
        plan = plan._replace(shared=shared, counted=counted)
        return timesteps, plan._replace(has_term=shared is not None and plan.takes_part)

    def _term_of_base_pass(self, passed: Pass, base_loss: Tensor) -> _Term:
        """The term of the base pass; 0 where it has none, which other processes may have nevertheless."""
        zero = torch.zeros((), device=base_loss.device)
        nothing = _Term(FrequencyLoss(zero, zero, zero), passed)
        if not self.config.enabled or self.config.timesteps == "unified":
            return nothing
        parts = gather_parts(passed.prediction, has_term=self._plan.has_term)
        if self._plan.has_term:
            reference = functools.partial(base_gradient, base_loss, passed.prediction)
            return self._weighed(self._of_counted_samples(passed), reference, parts, same_pass=True)
        if parts.shapes:
            dtype = torch.promote_types(passed.prediction.dtype, torch.float32)
            add_nothing(parts, passed.prediction.new_empty((), dtype=dtype))
            if self._balance is not None:
                self._balance.observe_nothing(passed.prediction.device)
        return nothing

    def _of_counted_samples(self, passed: Pass) -> Pass:
        """The pass at the timestep of its term; samples that this is not computed from weigh 0."""
        weights, counted = passed.sample_weights, self._plan.counted
        if counted is not None:
            counted = counted.to(passed.prediction.device, torch.float32, non_blocking=True)
            weights = counted if weights is None else weights * counted
        timesteps = passed.timesteps if self._plan.shared is None else self._plan.shared
        return passed._replace(timesteps=timesteps, sample_weights=weights)

    def _weighed(self, passed: Pass, reference: Callable[[], Tensor], parts: Parts, *, same_pass: bool) -> _Term:
        """The term of a pass, weighed against the gradient ``reference`` where the options ask for that."""
        mean = self.config.reduction == "mean"

        def loss_of(prediction: Tensor) -> FrequencyLoss:
            return self._loss(passed, prediction, lambda difference: sum_over_processes(difference, parts, mean=mean))

        if self._balance is None:
            return _Term(loss_of(passed.prediction), passed)
        detached = detached_term(passed.prediction, loss_of)
        loss, logs = self._balance.weigh(passed.prediction, detached, reference(), same_pass=same_pass)
        return _Term(loss, passed, logs)

    def _loss(
        self, passed: Pass, prediction: Tensor, combine: Callable[[Tensor], Tensor] | None = None
    ) -> FrequencyLoss:
        self.config.check_size(*prediction.shape[-2:])
        return frequency_matching_loss(
            prediction,
            passed.target,
            prediction_type=self._prediction_type,
            timesteps=passed.timesteps,
            alphas_cumprod=self._schedule(passed),
            sample_weights=passed.sample_weights,
            mask=passed.mask,
            config=self.config,
            combine=combine,
        )

    def _schedule(self, passed: Pass) -> Tensor | None:
        """alpha_bar where the timesteps are, so that looking it up moves nothing between devices in a step."""
        if passed.alphas_cumprod is None:
            return None
        timesteps = passed.timesteps
        device = timesteps.device if isinstance(timesteps, Tensor) else torch.device("cpu")
        if device not in self._schedules:
            self._schedules[device] = passed.alphas_cumprod.detach().to(device=device, dtype=torch.float32)
        return self._schedules[device]
