"""What is used of the objects of the training programs and accelerate, which are not imported here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from freq_loss_plugin.loss.latents import PredictionType

# A batch of the data loader: latents or images, loss_weights, alpha_masks, and others.
Batch: TypeAlias = Mapping[str, Any]
# The entry of a batch that names its images by paths, put there by the plug-in where an option needs them.
IMAGES = "freq_loss_images"


class Family(Protocol):
    """What one trainer class trains."""

    @property
    def name(self) -> str:
        """Human-readable."""
        ...

    @property
    def network_module(self) -> str:
        """The LoRA module that belongs to it."""
        ...

    def prediction_type(self, args: argparse.Namespace) -> PredictionType:
        """What its model predicts."""
        ...


class Trainer(Protocol):
    """A NetworkTrainer; the methods that are replaced or relied on are in ``host`` of each program's folder."""

    _freq_loss_hook: Any  # kohya_patch's own, while it is installed

    def train(self, args: argparse.Namespace) -> None:
        """Train a network."""


class Tracker(Protocol):
    """One of accelerate's trackers; that for TensorBoard has a ``writer``."""

    name: str
    writer: Any


class Accelerator(Protocol):
    """accelerate's Accelerator."""

    device: torch.device
    process_index: int
    trackers: Sequence[Tracker]

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """Scale and propagate a loss."""

    def unwrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model without its wrapper for several processes."""
        ...

    def get_tracker(self, name: str) -> Tracker:
        """A tracker by its name."""
        ...

    def register_save_state_pre_hook(self, hook: Callable[..., None]) -> Handle:
        """Let ``hook`` be called before a state is saved."""
        ...


class Handle(Protocol):
    """What takes a hook away."""

    def remove(self) -> None:
        """Take it away."""
