"""The trainer's own forward passes at timesteps of this project's choice: unified's extra pass, and shared's pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.step import separate_random_stream, shared_timesteps, stream_name, unified_timestep

from . import host
from .timesteps import SampleDistributions, at_one_timestep, choosing_timesteps, coupled_timesteps
from .trainers import Training

# sd-scripts casts its timesteps to the training dtype; bfloat16 has steps of 4 in 512..1000.
_TIMESTEP_TOLERANCE = 4.0


class Pass(NamedTuple):
    """A pass of the trainer.

    Attributes:
        results: what ``get_noise_pred_and_target`` returned.
        timestep: the one of the batch, None where the batch shares none in the window.
        sample_mask: the samples that take it, shape (B,), boolean; None where all do.
    """

    results: Any
    timestep: float | None
    sample_mask: Tensor | None = None


class TimestepPasses:
    """Runs the passes of one training and counts them.

    Args:
        training: the running training.
        config: the options.
        number: passes before this one, in a resumed training.

    Raises:
        UnsupportedTrainerError: the trainer draws its timesteps in an unknown way, and shared has to change them.
    """

    def __init__(self, training: Training, config: FreqLossConfig, number: int) -> None:
        self._trainer = type(training.trainer)
        self._family = training.family
        self._seed = getattr(training.args, "seed", None)
        self._config = config
        self._number = number
        shares = config.enabled and config.timesteps == "shared"
        self._drawing = host.drawing_function(self._trainer, self._family.prediction) if shares else None
        self._timesteps_were_obeyed = False

    def unified(self, run: Callable[..., Any], call: inspect.BoundArguments, accelerator: Any) -> Pass:
        """One more pass at one timestep for the batch; the noise differs between processes.

        Args:
            run: the trainer's own ``get_noise_pred_and_target``.
            call: the arguments of this batch.
            accelerator: the trainer's.

        Raises:
            UnsupportedTrainerError: the trainer did not use the timestep.
        """
        timestep = unified_timestep(self._config, self._seed, self._number)
        stream = f"{stream_name(self._seed, self._number)}:{accelerator.process_index}"
        self._number += 1
        pinned = {**call.arguments, "args": at_one_timestep(call.arguments["args"], timestep)}
        extra = inspect.BoundArguments(call.signature, pinned)
        with separate_random_stream(stream, accelerator.device):
            results = run(*extra.args, **extra.kwargs)
        self._check_timesteps(results[2], [timestep] * len(results[2]))
        return Pass(results, timestep)

    def shared(self, run: Callable[..., Any], call: inspect.BoundArguments, accelerator: Any) -> Pass:
        """The trainer's pass, at one timestep inside the window for the batch, or at several outside it.

        Args and errors are those of `unified`.
        """
        name = f"{stream_name(self._seed, self._number)}:shared"
        self._number += 1
        chosen: list[tuple[Tensor, float | None, Tensor | None]] = []

        def choose(draw: Callable[[int], Tensor], count: int, own: SampleDistributions | None) -> Tensor:
            process = accelerator.process_index
            if own is None:
                chosen.append((*shared_timesteps(draw, count, self._config, name, process), None))
            else:
                chosen.append(coupled_timesteps(draw, own, self._config, name, process))
            return chosen[-1][0]

        assert self._drawing is not None
        with choosing_timesteps(self._family.prediction, self._drawing, choose):
            results = run(*call.args, **call.kwargs)
        if len(chosen) != 1:
            raise host.unsupported(self._trainer, f"one call of {self._drawing.name} in a pass", str(len(chosen)))
        timesteps, shared, sample_mask = chosen[0]
        self._check_timesteps(results[2], timesteps.tolist())
        return Pass(results, shared, sample_mask)

    def _check_timesteps(self, returned: Tensor, asked: list[float]) -> None:
        """Once per training: did the trainer really use the timesteps that it was asked for?"""
        if self._timesteps_were_obeyed:
            return
        found = (returned.detach().float() * self._family.timestep_scale).flatten().tolist()
        if any(abs(one - other) > _TIMESTEP_TOLERANCE for one, other in zip(found, asked, strict=True)):
            raise host.UnsupportedTrainerError(
                f"asked {self._trainer.__name__} for timesteps {asked}, and got {found}: this sd-scripts draws "
                "its timesteps in a way that kohya_patch does not know; set freq_loss_timesteps = 'own'"
            )
        self._timesteps_were_obeyed = True
