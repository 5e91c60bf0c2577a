"""The frequency term of one pass of a trainer of sd-scripts, with everything that the trainer knows about its batch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freq_loss_plugin import FreqLossConfig, FrequencyLoss, frequency_matching_loss
from freq_loss_plugin.balance import Balance, DetachedTerm, base_gradient, detached_term
from freq_loss_plugin.latents import residual_scale
from freq_loss_plugin.memory import ResidualMemory

from . import host
from .trainers import Training


class Term(NamedTuple):
    """The frequency term of a batch, and what it was computed from.

    ``gradient`` is there where the term is still to be weighed against the base loss, ``logs`` where it was.
    """

    loss: FrequencyLoss
    prediction: Tensor
    target: Tensor
    timesteps: Tensor | float
    gradient: Tensor | None = None
    logs: Mapping[str, Tensor] = MappingProxyType({})


class TermMaker:
    """Computes the terms of one training.

    Args:
        training: the running training.
        config: the options.
        memory: the batches before, where the options ask for them.
        balance: what weighs the terms against the base loss, where the options ask for it.
    """

    def __init__(
        self, training: Training, config: FreqLossConfig, memory: ResidualMemory | None, balance: Balance | None
    ) -> None:
        self._trainer = type(training.trainer)
        self._args = training.args
        self._family = training.family
        self._prediction_type = training.family.prediction_type(training.args)
        self._config = config
        self._memory = memory
        self._balance = balance
        self._schedules: dict[torch.device, Tensor] = {}

    def compute(
        self, call: dict[str, Any], results: Any, timesteps: Tensor | float | None, sample_mask: Tensor | None = None
    ) -> Term:
        """The term of a pass.

        Args:
            call: the arguments of ``process_batch``.
            results: what ``get_noise_pred_and_target`` returned.
            timesteps: None where the batch shares none in the window; the term is then 0.
            sample_mask: the samples that count, shape (B,), boolean; None for all.
        """
        prediction, target, drawn = results[:3]
        batch, device = call["batch"], call["accelerator"].device
        if timesteps is None:
            return Term(FrequencyLoss(*torch.zeros(3, device=device)), prediction, target, drawn)
        loss_of = functools.partial(
            frequency_matching_loss,
            target=target,
            prediction_type=self._prediction_type,
            timesteps=timesteps,
            alphas_cumprod=self._schedule(call["noise_scheduler"], timesteps),
            sample_weights=_sample_weights(batch, sample_mask, device),
            mask=self._mask(batch, prediction),
            config=self._config,
            memory=self._memory,
            across_processes=True,
        )
        if self._balance is None:
            return Term(loss_of(prediction), prediction, target, timesteps)
        detached = detached_term(prediction, loss_of)
        return Term(detached.loss, prediction, target, timesteps, detached.gradient)

    def weighed(self, term: Term) -> Term:
        """The term of an extra pass, weighed where the options ask for it."""
        if term.gradient is None or self._balance is None:
            return term
        beside = term.prediction.detach().float() - term.target.detach().float()
        return _weighed(self._balance, term, term.gradient, beside, same_pass=False)

    def weighed_against(self, base_loss: Tensor, prediction: Tensor | None, term: Term) -> Term:
        """The term of a batch, weighed against its base loss where the options ask for it.

        Args:
            base_loss: what the trainer's ``process_batch`` returned.
            prediction: what the base loss was computed from.
            term: of the same batch.

        Raises:
            UnsupportedTrainerError: the base loss has no gradient by the prediction.
        """
        if self._balance is None or prediction is None:
            return term
        if term.gradient is None and (self._balance.share is None or not term.logs):
            return term  # nothing to compare with, or nobody who asks
        beside = base_gradient(base_loss, prediction)
        if beside is None:
            raise host.UnsupportedTrainerError(
                f"freq_loss_share and freq_loss_grad_cosine: {self._trainer.__name__} does not compute its loss "
                "from the prediction that get_noise_pred_and_target returned; leave both out"
            )
        if term.gradient is None:  # it had a pass of its own
            self._balance.observe_base(beside)
            return term
        return _weighed(self._balance, term, term.gradient, beside, same_pass=True)

    def reported_timesteps(self, call: dict[str, Any], results: Any) -> Tensor:
        """Those that the trainer returned, on the scale 0..1000; whole numbers stay what they are."""
        timesteps: Tensor = results[2].to(call["accelerator"].device)
        return timesteps if self._family.timestep_scale == 1 else timesteps * self._family.timestep_scale

    def residual_scale(self, call: dict[str, Any], timesteps: Tensor) -> Tensor | float:
        """What turns an error of the prediction into one of the clean latents."""
        return residual_scale(self._prediction_type, timesteps, self._schedule(call["noise_scheduler"], timesteps))

    def _mask(self, batch: Any, like: Tensor) -> Tensor | None:
        """The mask by which sd-scripts multiplies its loss, at the size of the latents; None where it uses none."""
        if not getattr(self._args, "masked_loss", False) and batch.get("alpha_masks") is None:
            return None
        ones = torch.ones(like.shape[0], 1, *like.shape[2:], device=like.device)
        mask: Tensor = host.masked_loss(self._trainer)(ones, batch)  # its own rule, so that both agree
        return mask

    def _schedule(self, noise_scheduler: Any, timesteps: Tensor | float) -> Tensor | None:
        """alpha_bar where the timesteps are: sd-scripts moves its own copy between CPU and GPU in every step."""
        if self._family.prediction != "scheduler":
            return None
        device = timesteps.device if isinstance(timesteps, Tensor) else torch.device("cpu")
        if device not in self._schedules:
            schedule = getattr(noise_scheduler, "alphas_cumprod", None)
            if schedule is None:
                raise host.UnsupportedTrainerError(
                    f"{self._trainer.__name__} uses {type(noise_scheduler).__name__}, which has no "
                    "alphas_cumprod: it is not one of the trainers that kohya_patch knows how to read"
                )
            self._schedules[device] = schedule.detach().to(device=device, dtype=torch.float32)
        return self._schedules[device]


def _weighed(balance: Balance, term: Term, gradient: Tensor, beside: Tensor, *, same_pass: bool) -> Term:
    loss, logs = balance.weigh(term.prediction, DetachedTerm(term.loss, gradient), beside, same_pass=same_pass)
    return term._replace(loss=loss, logs=logs, gradient=None)


def _sample_weights(batch: Any, sample_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """sd-scripts' weight of each sample: prior_loss_weight for regularization images, otherwise 1; 0 off the mask."""
    weights: Tensor | None = batch.get("loss_weights")
    if sample_mask is not None:
        weights = sample_mask.float() if weights is None else weights * sample_mask.to(weights.device)
    return None if weights is None else weights.to(device, non_blocking=True)
