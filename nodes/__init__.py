"""The ComfyUI adapter: nine nodes, each a thin layer over a function of `freq_loss_plugin`.

Read it in this order: `core` (what is assumed of ComfyUI), `schema`, `inputs` and `formats` (what several nodes share),
`lora_files` and `lora_fit` (LoRA files, and whether they fit a model), then the nodes: `bands`, `analysis`,
`lora_loader`, `lora_gate`, `guidance`.
"""

from __future__ import annotations

from . import core  # noqa: F401 - first: it checks the installed ComfyUI

# isort: split
from comfy_api.latest import ComfyExtension, io

from .analysis import BandLoss, BandPreview, SpectrumCompare
from .bands import BandMerge, BandOperation, BandSplit
from .guidance import GuidanceToken
from .lora_gate import LoraBandGate
from .lora_loader import LoraLoader

# The ids are written into everyone's workflows and never change.
NODES: list[type[io.ComfyNode]] = [
    BandSplit,
    BandMerge,
    BandPreview,
    SpectrumCompare,
    BandLoss,
    LoraLoader,
    BandOperation,
    LoraBandGate,
    GuidanceToken,
]


class FreqLossExtension(ComfyExtension):
    """Tells ComfyUI which nodes there are."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the classes of all nodes."""
        return NODES


async def comfy_entrypoint() -> FreqLossExtension:
    """Return the extension; ComfyUI calls this when it loads the pack."""
    return FreqLossExtension()
