"""``freq_loss_validation``: sd-scripts' own validation passes, told in bands to its own trackers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.report import Remark
from freq_loss_plugin.validation import ValidationBands, ValidationResult

from . import report

PREFIX = "loss/validation/freq_"


class ValidationReport:
    """Collects what the trainer validates, and adds it to what the trainer logs of its validation.

    No pass is made for it: how often, on which images and at which timesteps follows from sd-scripts'
    ``validation_split`` and ``validate_every_n_steps``. Every process sees its own part; the main one logs.

    Args:
        config: the options.
    """

    def __init__(self, config: FreqLossConfig) -> None:
        self._config = config
        self._bands = ValidationBands(config)
        self._has_told = False

    def add(self, latents: Tensor, results: Any, scale: Tensor | float, timesteps: Tensor) -> None:
        """Take a validation pass: its clean latents, and what ``get_noise_pred_and_target`` returned."""
        self._bands.add(latents, results[0] - results[1], scale, timesteps)

    def discard(self) -> None:
        """Forget what nobody asked for: without a tracker the trainer does not log."""
        self._bands = ValidationBands(self._config)

    def join(self, accelerator: Any, logs: dict[str, Any], step: int) -> dict[str, Any]:
        """``logs`` of a finished validation with ours, and one image in TensorBoard; other logs as they are."""
        if not any(name.startswith("loss/validation/") and name.endswith("_average") for name in logs):
            return logs
        result = self._bands.finish()
        if result is None:
            self._tell_once(
                "freq_loss_validation: none of the timesteps at which sd-scripts validated lies in the window "
                f"{self._config.min_timestep}..{self._config.max_timestep}; there is nothing to log"
            )
            return logs
        self._draw(accelerator, result, step)
        return {**logs, **{f"{PREFIX}{name}": value for name, value in result.numbers.items()}}

    def _draw(self, accelerator: Any, result: ValidationResult, step: int) -> None:
        if not any(tracker.name == "tensorboard" for tracker in accelerator.trackers):
            return
        from freq_loss_plugin.drawing import spectrum_plot

        try:
            plot = spectrum_plot(result.spectra, "A: predicted clean latents, B: clean latents")
        except ImportError as error:
            self._tell_once(f"freq_loss_validation: numbers without the image of the spectra; {error}")
            return
        writer = accelerator.get_tracker("tensorboard").writer
        writer.add_image(f"{PREFIX}spectrum", plot.numpy(), step, dataformats="HWC")

    def _tell_once(self, text: str) -> None:
        if not self._has_told:
            self._has_told = True
            report.tell(Remark(text, True))
