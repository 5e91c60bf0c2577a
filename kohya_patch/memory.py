"""The memory across batches in sd-scripts' state folders: a file of its own, which everything else passes over."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.memory import ResidualMemory
from freq_loss_plugin.report import Remark

from . import report
from .trainers import is_main_process

FILE = "freq_loss_memory.safetensors"


class KeptMemory(ResidualMemory):
    """A memory that is saved with ``--save_state`` and goes on with ``--resume``.

    sd-scripts saves states in its main process. With ``freq_loss_scope = "global"`` all processes remember the same;
    with ``"local"`` the others begin anew.

    Args:
        config: the options.
        args: sd-scripts' arguments; where a state to resume from lacks the file (it had no memory, or lies on the
            Hugging Face Hub), the memory begins anew, and says so.
    """

    def __init__(self, config: FreqLossConfig, args: argparse.Namespace) -> None:
        super().__init__(config)
        self._hook: Any = None
        file = Path(getattr(args, "resume", None) or "") / FILE
        if getattr(args, "resume", None) and file.is_file() and (config.scope == "global" or is_main_process()):
            from safetensors.torch import load_file

            self.load_state_dict(load_file(file))
        elif getattr(args, "resume", None):
            report.tell(Remark(f"freq_loss_memory begins anew: {file} is not there, or another process's", True))

    def save_with(self, accelerator: Any) -> None:
        """Be saved whenever ``accelerator`` saves a state; to be called before it does."""
        if self._hook is None:
            self._hook = accelerator.register_save_state_pre_hook(self._save)

    def leave(self) -> None:
        """Be saved no more."""
        if self._hook is not None:
            self._hook.remove()

    def _save(self, models: Any, weights: Any, folder: str) -> None:
        from safetensors.torch import save_file

        save_file(self.state_dict(), str(Path(folder) / FILE))
