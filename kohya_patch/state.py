"""What the loss remembers across batches, in sd-scripts' state folders: a file that everything else passes over."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.balance import Balance, GradientShare
from freq_loss_plugin.memory import ResidualMemory
from freq_loss_plugin.report import Remark

from . import report
from .trainers import is_main_process

FILE = "freq_loss_state.safetensors"


class StateFile:
    """Saves the memory across batches and the averages of ``freq_loss_share``, and lets them go on.

    They are saved with ``--save_state`` and read with ``--resume``. sd-scripts saves states in its main process. The
    averages are the same in all processes, and so is the memory with ``freq_loss_scope = "global"``; with ``"local"``
    the memories of the others begin anew.

    Args:
        config: the options.
        args: sd-scripts' arguments; where a state to resume from lacks the file (it had nothing to remember, or lies on
            the Hugging Face Hub), it begins anew, and says so.
        memory: the memory, where there is one.
        balance: what weighs the term, where there is one.
    """

    def __init__(
        self,
        config: FreqLossConfig,
        args: argparse.Namespace,
        memory: ResidualMemory | None,
        balance: Balance | None,
    ) -> None:
        share = balance.share if balance is not None else None
        kept: dict[str, ResidualMemory | GradientShare | None] = {"memory": memory, "share": share}
        self._kept = {name: each for name, each in kept.items() if each is not None}
        self._hook: Any = None
        folder = getattr(args, "resume", None)
        if not folder or not self._kept:
            return
        file = Path(folder) / FILE
        found: dict[str, Tensor] = {}
        if file.is_file():
            from safetensors.torch import load_file

            found = load_file(file)
        for name, each in self._kept.items():
            part = {key.partition(".")[2]: value for key, value in found.items() if key.partition(".")[0] == name}
            if part and (name == "share" or config.scope == "global" or is_main_process()):
                each.load_state_dict(part)
            else:
                report.tell(Remark(f"freq_loss_{name} begins anew: {file} does not have it for this process", True))

    def save_with(self, accelerator: Any) -> None:
        """Be saved whenever ``accelerator`` saves a state; to be called before it does."""
        if self._hook is None and self._kept:
            self._hook = accelerator.register_save_state_pre_hook(self._save)

    def leave(self) -> None:
        """Be saved no more."""
        if self._hook is not None:
            self._hook.remove()

    def _save(self, models: Any, weights: Any, folder: str) -> None:
        from safetensors.torch import save_file

        state = {
            f"{name}.{key}": value for name, each in self._kept.items() for key, value in each.state_dict().items()
        }
        save_file(state, str(Path(folder) / FILE))
