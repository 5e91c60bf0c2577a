"""What a trainer of sd-scripts knows about a batch, as the frequency term takes it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from freq_loss_plugin.training.passes import Pass

from ..host import UnsupportedTrainerError
from ..protocols import Batch
from . import host
from .trainers import TrainingRun


class BatchReader:
    """Reads the passes of one run.

    Args:
        run: the run in progress.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._trainer = type(run.trainer)
        self._has_masks = bool(getattr(run.args, "masked_loss", False))
        self._family = run.family

    def read(self, call: Mapping[str, Any], results: Any) -> Pass:
        """A pass with everything that decides how its samples count.

        Args:
            call: the arguments of ``process_batch``.
            results: what ``get_noise_pred_and_target`` returned.

        Raises:
            UnsupportedTrainerError: the trainer's noise scheduler has no ``alphas_cumprod``.
        """
        prediction, target, timesteps = results[:3]
        batch, device = call["batch"], call["accelerator"].device
        timesteps = timesteps.to(device)
        if self._family.timestep_scale != 1:  # whole numbers stay what they are
            timesteps = timesteps * self._family.timestep_scale
        weights = batch.get("loss_weights")  # prior_loss_weight for regularization images, otherwise 1
        return Pass(
            prediction,
            target,
            timesteps,
            alphas_cumprod=self._alphas_cumprod(call["noise_scheduler"]),
            sample_weights=None if weights is None else weights.to(device, non_blocking=True),
            mask=self._mask(batch, prediction),
        )

    def _mask(self, batch: Batch, like: Tensor) -> Tensor | None:
        """The mask by which sd-scripts multiplies its loss, at the size of the latents; None where it uses none."""
        if not self._has_masks and batch.get("alpha_masks") is None:
            return None
        ones = torch.ones(like.shape[0], 1, *like.shape[2:], device=like.device)
        mask: Tensor = self._apply_masked_loss(ones, batch)  # its own rule, so that both agree
        return mask

    @functools.cached_property
    def _apply_masked_loss(self) -> Callable[..., Any]:
        return host.masked_loss(self._trainer)

    def _alphas_cumprod(self, noise_scheduler: Any) -> Tensor | None:
        if self._family.kind != "scheduler":
            return None
        alphas_cumprod: Tensor | None = getattr(noise_scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None:
            raise UnsupportedTrainerError(
                f"{self._trainer.__name__} uses {type(noise_scheduler).__name__}, which has no alphas_cumprod: it is "
                "not one of the trainers that kohya_patch knows how to read"
            )
        return alphas_cumprod
