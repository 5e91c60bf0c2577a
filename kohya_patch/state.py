"""What the loss keeps across batches, in a program's state folders: a file that everything else passes over."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.training.messages import Message
from freq_loss_plugin.training.term import FrequencyTerm

from . import report
from .protocols import Accelerator, Handle
from .runs import is_main_process

FILE = "freq_loss_state.safetensors"


class StateFile:
    """Saves the state of the frequency term with ``--save_state``, and restores it with ``--resume``.

    States are saved in the main process. The averages of the gradient ratio are the same in all processes, and
    so is the batch history with ``freq_loss_scope = "global"``; with ``"local"`` those of the other processes begin
    anew. Where the state to resume from lacks the file (there was nothing to save, or it lies on the Hugging Face Hub),
    everything begins anew, with a warning.

    Args:
        config: the options.
        args: the program's arguments.
        term: the frequency term of the run.
    """

    def __init__(self, config: FreqLossConfig, args: argparse.Namespace, term: FrequencyTerm) -> None:
        self._term = term
        self._hook: Handle | None = None
        folder = getattr(args, "resume", None)
        if not folder or not term.keeps_state:
            return
        file = Path(folder) / FILE
        state = _load(file)
        if config.scope == "local" and not is_main_process():
            state = {key: value for key, value in state.items() if not key.startswith("batch_history.")}
        for part in term.load_state_dict(state):
            report.log(Message(f"freq_loss_{part} begins anew: {file} does not have it for this process", True))

    def save_with(self, accelerator: Accelerator) -> None:
        """Save the term's state with every state of ``accelerator``; to be called before the first."""
        if self._hook is None and self._term.keeps_state:
            self._hook = accelerator.register_save_state_pre_hook(self._save)

    def remove(self) -> None:
        """Stop doing so."""
        if self._hook is not None:
            self._hook.remove()

    def _save(self, _models: Any, _weights: Any, folder: str) -> None:
        save_file(self._term.state_dict(), str(Path(folder) / FILE))


def _load(file: Path) -> dict[str, Tensor]:
    return load_file(file) if file.is_file() else {}
