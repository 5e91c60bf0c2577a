"""``freq_loss_validation``: sd-scripts' own validation passes, in bands, in its own trackers."""

from __future__ import annotations

from typing import Any

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.training.messages import Message
from freq_loss_plugin.training.validation import PREFIX, ValidationBands, ValidationResult

from .. import report
from ..protocols import Accelerator


class ValidationReport:
    """Collects what the trainer validates, and adds it to what the trainer logs of its validation.

    No pass is made for it: how often, on which images and at which timesteps follows from sd-scripts'
    ``validation_split`` and ``validate_every_n_steps``. Every process sees its own part; the main one logs.

    Args:
        config: the options.
        bands: of the frequency term, which takes the validation passes (`FrequencyTerm.validate`).
    """

    def __init__(self, config: FreqLossConfig, bands: ValidationBands) -> None:
        self._config, self._bands = config, bands
        self._has_warned = False

    def discard(self) -> None:
        """Forget passes that were never logged: without a tracker the trainer does not ask for them."""
        self._bands.clear()

    def join(self, accelerator: Accelerator, logs: dict[str, Any], step: int) -> dict[str, Any]:
        """``logs`` of a finished validation with ours, and one image in TensorBoard; other logs as they are."""
        if not any(name.startswith("loss/validation/") and name.endswith("_average") for name in logs):
            return logs
        result = self._bands.finish()
        if result is None:
            self._warn_once(
                "freq_loss_validation: none of the timesteps at which sd-scripts validated lies in the window "
                f"{self._config.min_timestep}..{self._config.max_timestep}; there is nothing to log"
            )
            return logs
        self._draw(accelerator, result, step)
        return {**logs, **result.logs()}

    def _draw(self, accelerator: Accelerator, result: ValidationResult, step: int) -> None:
        try:
            report.log_image(accelerator, f"{PREFIX}spectrum", result.plot, step)
        except ImportError as error:
            self._warn_once(f"freq_loss_validation: numbers without the image of the spectra; {error}")

    def _warn_once(self, text: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            report.log(Message(text, True))
