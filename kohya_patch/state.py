"""What the loss keeps across batches, in a program's state folders: a file that everything else passes over."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from freq_loss_plugin import ConfigError
from freq_loss_plugin.atomic_files import write_whole
from freq_loss_plugin.training.messages import Message
from freq_loss_plugin.training.term import FrequencyTerm

from . import report
from .protocols import Accelerator, Handle

FILE = "freq_loss_state.safetensors"


class StateFile:
    """Saves the state of the frequency term with ``--save_state``, and restores it with ``--resume``.

    It is the same in all processes, and is saved in the main one. Where the state to resume from lacks the file (there
    was nothing to save, or it lies on the Hugging Face Hub) or a part of it, that begins anew, with a warning.

    Args:
        args: the program's arguments.
        term: the frequency term of the run.
    """

    def __init__(self, args: argparse.Namespace, term: FrequencyTerm) -> None:
        self._term = term
        self._hook: Handle | None = None
        folder = getattr(args, "resume", None)
        if not folder or not term.keeps_state:
            return
        file = Path(folder) / FILE
        for part in term.load_state_dict(_load(file)):
            report.log(Message(f"freq_loss_{part} begins anew: {file} does not have it for these options", True))

    def save_with(self, accelerator: Accelerator) -> None:
        """Save the term's state with every state of ``accelerator``; to be called before the first."""
        if self._hook is None and self._term.keeps_state:
            self._hook = accelerator.register_save_state_pre_hook(self._save)

    def remove(self) -> None:
        """Stop doing so."""
        if self._hook is not None:
            self._hook.remove()

    def _save(self, _models: Any, _weights: Any, folder: str) -> None:
        state = self._term.state_dict()
        write_whole(Path(folder) / FILE, lambda part: save_file(state, str(part)))


def _load(file: Path) -> dict[str, Tensor]:
    """What a state file holds; empty where there is none.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return load_file(file) if file.is_file() else {}
    except SafetensorError as error:
        raise ConfigError(f"{file} is damaged ({error}); remove it, and what it kept begins anew") from None
