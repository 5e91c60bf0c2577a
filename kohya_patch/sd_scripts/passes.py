"""The trainer's own forward passes at timesteps of this project's choice.

Those are unified's extra pass, shared's pass, and that of a batch with images that train only above a noise level.
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
from freq_loss_plugin.training.timesteps import SampleDistributions

from ..host import UnsupportedTrainerError
from ..protocols import Accelerator
from . import host
from .host import SD_SCRIPTS
from .timesteps import TimestepChoice, at_one_timestep
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
        with separate_random_stream(f"{plan.stream}:{accelerator.process_index}", accelerator.device):
            results = forward(*extra.args, **extra.kwargs)
        self._check_timesteps(results[2], [plan.extra] * len(results[2]))
        return results

    def shared(self, forward: Callable[..., Any], call: inspect.BoundArguments, make_plan: Callable[..., Plan]) -> Any:
        """The trainer's pass, at one timestep inside the window for the batch, or at several outside it.

        Args:
            forward: as in `extra`.
            call: as in `extra`.
            make_plan: `FrequencyTerm.plan`.

        Returns:
            What the trainer's method returned.

        Raises:
            UnsupportedTrainerError: the trainer did not draw its timesteps once, or did not use those of the plan.
        """
        assert self._choice is not None
        chosen: list[Tensor] = []

        def choose(draw: Callable[[int], Tensor], count: int, per_sample: SampleDistributions | None) -> Tensor:
            timesteps = make_plan(count, draw, per_sample).timesteps
            assert timesteps is not None
            chosen.append(timesteps)
            return timesteps

        with self._choice.made_by(choose):
            results = forward(*call.args, **call.kwargs)
        if len(chosen) != 1:
            raise SD_SCRIPTS.unsupported(self._trainer, f"one call of {self._choice.name} in a pass", str(len(chosen)))
        self._check_timesteps(results[2], chosen[0].tolist())
        return results

    def above(self, forward: Callable[..., Any], call: inspect.BoundArguments, least: Tensor, stream: str) -> Any:
        """The trainer's pass, where no sample is below its least timestep.

        Args:
            forward: as in `extra`.
            call: as in `extra`.
            least: the least timesteps, shape (B,), on the CPU and the scale 0..1000.
            stream: names the random stream in which timesteps are drawn again.

        Returns:
            What the trainer's method returned.

        Raises:
            UnsupportedTrainerError: the trainer did not draw its timesteps once, or uses others.
        """
        assert self._choice is not None
        with self._choice.above(least, stream) as calls:
            results = forward(*call.args, **call.kwargs)
        if len(calls) != 1:
            raise SD_SCRIPTS.unsupported(self._trainer, f"one call of {self._choice.name} in a pass", str(len(calls)))
        if not self._timesteps_were_checked:
            used = (results[2].detach().float() * self._family.timestep_scale).flatten().cpu()
            self._check_timesteps(results[2], torch.maximum(used, least.float()).tolist())
        return results

    def _check_timesteps(self, returned: Tensor, asked: list[float]) -> None:
        """Once in a run: did the trainer really use the timesteps that it was asked for?"""
        if self._timesteps_were_checked:
            return
        used = (returned.detach().float() * self._family.timestep_scale).flatten().tolist()
        if any(abs(one - other) > _TIMESTEP_TOLERANCE for one, other in zip(used, asked, strict=True)):
            raise UnsupportedTrainerError(
                f"asked {self._trainer.__name__} for timesteps {asked}, and got {used}: this sd-scripts draws "
                "its timesteps in a way that kohya_patch does not know; set freq_loss_timesteps = 'own'"
            )
        self._timesteps_were_checked = True
