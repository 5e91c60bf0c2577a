"""The ComfyUI adapter: nine nodes, each a thin layer over a function of `freq_loss_plugin`.

Read it in this order: `schema` (what a core may not know), `inputs` (what several nodes share), then the nodes:
`bands`, `analysis`, `lora`, `guidance`.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .analysis import BandLoss, BandPreview, SpectrumCompare
from .bands import BandMerge, BandOperation, BandSplit
from .guidance import GuidanceToken
from .lora import LoraBandGate, LoraLoader

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
