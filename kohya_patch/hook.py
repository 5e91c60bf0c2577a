"""What the hooks of all training programs share: the frequency term, its numbers, its state, and the metadata.

The methods of the running trainer *object* are replaced; its class and the program's files stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.image_quality.survey import SUMMARY_KEY
from freq_loss_plugin.training.distributed import gather
from freq_loss_plugin.training.messages import Message
from freq_loss_plugin.training.term import FrequencyTerm

from . import report
from .image_quality import ImageQuality
from .patching import PatchedMethods
from .protocols import Accelerator
from .runs import TrainingRun, process_index
from .state import StateFile


class Hook:
    """Adds the frequency term to every training batch of one run.

    Args:
        run: the run in progress; its trainer must have passed the checks of its program.
        config: the options. With ``dist_match = 0`` only the metadata are touched.
        network_module: name of the module that made the network, for ``ss_network_module``.
        quality: of the training images, where they train by it.
        step: how many optimizer steps a resumed run has behind it.

    Attributes:
        term: the frequency term.
        step: optimizer steps done.
    """

    def __init__(
        self,
        run: TrainingRun,
        config: FreqLossConfig,
        network_module: str,
        quality: ImageQuality | None = None,
        step: int = 0,
    ) -> None:
        self._trainer, self._args = run.trainer, run.args
        self._config, self._network_module, self._quality = config, network_module, quality
        self._methods = PatchedMethods(run.trainer)
        self.step = step
        seed = getattr(run.args, "seed", None)
        self.term = FrequencyTerm(
            config,
            run.family.prediction_type(run.args),
            # Without a seed each process of a host draws one by itself; that of the first one is taken.
            seed=gather(seed)[0] if config.changes_training else seed,
            first_batch=step * (getattr(run.args, "gradient_accumulation_steps", None) or 1),
            process=process_index(),
            max_train_steps=getattr(run.args, "max_train_steps", None),
            least=None if quality is None else quality.least,
        )
        self._state = StateFile(run.args, self.term)
        self._draws_balance = config.balanced
        self._accelerator: Accelerator | None = None
        self._logs: dict[str, float] = {}

    def replacements(self) -> Mapping[str, Callable[..., Any]]:
        """The trainer's methods that the options need to be replaced, by name."""
        raise NotImplementedError

    def install(self) -> None:
        """Replace the methods on the trainer object; the hook of an earlier run is removed first."""
        earlier = vars(self._trainer).get("_freq_loss_hook")
        if earlier is not None:
            earlier.uninstall()
        self._trainer._freq_loss_hook = self
        for name, replacement in self.replacements().items():
            self._methods.replace(name, replacement)

    def uninstall(self) -> None:
        """Give the trainer its own methods back."""
        self._methods.restore()
        self._state.remove()
        del self._trainer._freq_loss_hook

    def _begin_batch(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._state.save_with(accelerator)

    def _end_step(self) -> None:
        """Read the numbers of the step; raises NonFiniteLossError where one is not finite."""
        metrics = self.term.settle(self.step + 1)
        if metrics is not None:
            self._logs = metrics.logs(has_term=self._config.enabled)
            report.log(metrics.message)
            if self._draws_balance:
                self._draw_balance()
        self.step += 1

    def _draw_balance(self) -> None:
        assert self._accelerator is not None
        try:
            report.log_image(self._accelerator, "loss/balance_weights", self.term.balance_plot, self.step + 1)
        except ImportError as error:
            self._draws_balance = False
            report.log(Message(f"freq_loss_balance: numbers without the image of the weights; {error}", True))

    def _metadata(self) -> dict[str, str]:
        """What a LoRA file says of the plug-in."""
        metadata = {"ss_network_module": self._network_module}
        if self._config.changes_training or self._config.guided:
            metadata |= self._config.file_metadata(self._network_module)
        if self._quality is not None:
            metadata[SUMMARY_KEY] = self._quality.survey.summary
        return metadata
