"""What passes between a trainer and the frequency term: the result of a forward pass, and the plan for a batch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .distributed import there_are_several


class Pass(NamedTuple):
    """What a pass of the model returned, and how its samples count.

    Attributes:
        prediction: shape (B, C, H, W) or (B, C, T, H, W).
        target: the same shape.
        timesteps: on the scale 0..1000, shape (B,), or one number for all.
        alphas_cumprod: alpha_bar of the schedule, shape (1000,), where the model predicts epsilon or v.
        sample_weights: the trainer's weights of the samples, shape (B,).
        mask: what the trainer multiplies its loss by, broadcastable to ``prediction``.
    """

    prediction: Tensor
    target: Tensor
    timesteps: Tensor | float
    alphas_cumprod: Tensor | None = None
    sample_weights: Tensor | None = None
    mask: Tensor | None = None

    def detached(self) -> Pass:
        """The same without the model's graph."""
        return self._replace(prediction=self.prediction.detach(), target=self.target.detach())


class Plan(NamedTuple):
    """At which timesteps a batch trains.

    Attributes:
        stream: names the random stream of the batch, the same in all processes.
        own_stream: names that of what each process draws for itself.
        extra: the timestep of the extra pass, or None where there is none.
        least: the samples' least timesteps, shape (B,), on the CPU; None where there are none.
        chooses: whether `FrequencyTerm.choose` decides on the timesteps of the base pass, and not the trainer alone.
        shared: the timestep that the batch shares, or None.
        counted: the samples that the term is computed from, shape (B,), boolean; None where all are.
        has_term: whether the base pass has a frequency term.
        weights: of the samples in the base loss, shape (B,); see `freq_loss_plugin.training.update_shares`.
    """

    stream: str
    own_stream: str
    extra: int | None = None
    least: Tensor | None = None
    chooses: bool = False
    shared: float | None = None
    counted: Tensor | None = None
    has_term: bool = False
    weights: Tensor | None = None

    @property
    def takes_part(self) -> bool:
        """Whether the batch has samples for its term; those of several processes have one together."""
        return there_are_several() or self.counted is None or bool(self.counted.any())

    def with_extra_pass(self, timestep: int) -> Plan:
        """With an extra pass, where some of the samples may train at its timestep."""
        if self.least is None:
            return self._replace(extra=timestep)
        plan = self._replace(counted=self.least <= timestep)
        return plan._replace(extra=timestep) if plan.takes_part else plan
