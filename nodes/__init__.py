"""The ComfyUI nodes, each a thin layer over a function of `freq_loss_plugin`.

Read it in this order: `core` (what is assumed of ComfyUI), `schema`, `inputs` and `formats` (what several nodes share),
`lora_files` and `lora_fit` (LoRA files, and whether they fit a model), then the nodes: `bands`, `analysis`,
`quality`, `lora_loader`, `lora_gate` (with `lora_branches`), `guidance_token`.
"""

from __future__ import annotations

from . import core  # noqa: F401 - first: it checks the installed ComfyUI

# isort: split
from comfy_api.latest import ComfyExtension, io

from .analysis import BandLoss, BandPreview, SpectrumCompare
from .bands import BandMerge, BandOperation, BandSplit
from .guidance_token import GuidanceToken
from .lora_gate import LoraBandGate
from .lora_loader import LoraLoader
from .quality import ImageQuality

# Their ids are saved in everyone's workflows and never change.
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
    ImageQuality,
]


class FreqLossExtension(ComfyExtension):
    """The list of nodes, for ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the classes of all nodes."""
        return NODES


async def comfy_entrypoint() -> FreqLossExtension:
    """Return the extension; ComfyUI calls this when it loads the pack."""
    return FreqLossExtension()
