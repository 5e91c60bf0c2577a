"""The trainer's own forward passes at timesteps of this project's choice.

Those are unified's extra pass, and the pass of a batch that shares a timestep or has images with a least timestep.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.training.passes import Plan
from freq_loss_plugin.training.random_streams import separate_random_stream

from ..host import UnsupportedTrainerError
from ..protocols import Accelerator
from . import host
from .host import SD_SCRIPTS
from .timesteps import Choose, TimestepChoice, at_one_timestep
from .trainers import TrainingRun

# sd-scripts casts its timesteps to the training dtype; bfloat16 has steps of 4 in 512..1000.
_TIMESTEP_TOLERANCE = 4.0


class TimestepPasses:
    """Runs the passes of one run.

    Args:
        run: the run in progress.
        config: the options.

    Raises:
        UnsupportedTrainerError: the trainer draws its timesteps in an unknown way, and they have to be changed.
    """

    def __init__(self, run: TrainingRun, config: FreqLossConfig) -> None:
        self._trainer = type(run.trainer)
        self._family = run.family
        self._timesteps_were_checked = False
        self._choice: TimestepChoice | None = None
        if config.gated or (config.enabled and config.timesteps == "shared"):
            kind = run.family.kind
            self._choice = TimestepChoice(kind, host.drawing_function(self._trainer, kind))

    def extra(
        self, forward: Callable[..., Any], call: inspect.BoundArguments, accelerator: Accelerator, plan: Plan
    ) -> Any:
        """One more pass, at the timestep that was planned for it; the noise differs between processes.

        Args:
            forward: the trainer's own ``get_noise_pred_and_target``.
            call: the arguments of this batch.
            accelerator: the trainer's.
            plan: for this batch.

        Returns:
            What the trainer's method returned.

        Raises:
            UnsupportedTrainerError: the trainer did not use the timestep.
        """
        assert plan.extra is not None
        pinned = {**call.arguments, "args": at_one_timestep(call.arguments["args"], plan.extra)}
        extra = inspect.BoundArguments(call.signature, pinned)
        with separate_random_stream(plan.own_stream, accelerator.device):
            results = forward(*extra.args, **extra.kwargs)
        self._check_timesteps(results[2], plan.extra)
        return results

    def chosen(self, forward: Callable[..., Any], call: inspect.BoundArguments, choose: Choose, stream: str) -> Any:
        """The trainer's pass at chosen timesteps.

        Args:
            forward: as in `extra`.
            call: as in `extra`.
            choose: `FrequencyTerm.choose`.
            stream: names the random stream of what this process draws besides.

        Returns:
            What the trainer's method returned.

        Raises:
            UnsupportedTrainerError: the trainer did not draw its timesteps once, or did not use those that were chosen.
        """
        assert self._choice is not None
        with self._choice.made_by(choose, stream) as chosen:
            results = forward(*call.args, **call.kwargs)
        if len(chosen) != 1:
            raise SD_SCRIPTS.unsupported(self._trainer, f"one call of {self._choice.name} in a pass", str(len(chosen)))
        self._check_timesteps(results[2], chosen[0])
        return results

    def _check_timesteps(self, returned: Tensor, asked: Tensor | int) -> None:
        """Once in a run: did the trainer really use the timesteps that it was asked for?"""
        if self._timesteps_were_checked:
            return
        used = (returned.detach().float() * self._family.timestep_scale).flatten().cpu()
        wanted = torch.as_tensor(asked, dtype=torch.float32).cpu().expand(len(used))
        if ((used - wanted).abs() > _TIMESTEP_TOLERANCE).any():
            raise UnsupportedTrainerError(
                f"asked {self._trainer.__name__} for timesteps {wanted.tolist()}, and got {used.tolist()}: this "
                "sd-scripts draws its timesteps in a way that kohya_patch does not know; set freq_loss_timesteps = "
                "'own' and freq_loss_image_quality = 'off'"
            )
        self._timesteps_were_checked = True
