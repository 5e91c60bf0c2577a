"""Calls nodes of the pack in a real ComfyUI, without its server, so that tests see the output tensors.

    python execute.py COMFYUI FOLDER

Reads names of files, one a line, until there are no more. Each is a file of torch.save with a list of (node id, inputs)
or (node id, inputs, latent): an operation is applied to the latent. The file is overwritten with a list of outputs, or
of "ErrorName: message", in the same order, and its name is printed. The pack is loaded by ComfyUI's own loader from
FOLDER/custom_nodes/freq_loss_plugin.
"""

from __future__ import annotations

import asyncio
import copy
import sys
from pathlib import Path
from typing import Any

import torch


def same(first: Any, second: Any) -> bool:
    """Whether two input values are equal."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))
    return first == second


def call(node: Any, inputs: dict[str, Any], latent: torch.Tensor | None = None) -> Any:
    before = copy.deepcopy(inputs)
    try:
        outputs = node.PREPARE_CLASS_CLONE({}).EXECUTE_NORMALIZED(**inputs).args
        if latent is not None:
            outputs = (outputs[0](latent=latent),)
    except Exception as error:  # noqa: BLE001 - whatever a node raises is compared
        return f"{type(error).__name__}: {error}"
    assert same(before, inputs), f"{node.__name__} changed its inputs"
    return outputs


def main() -> None:
    comfyui, folder = map(Path, sys.argv[1:])
    sys.path.insert(0, str(comfyui))
    sys.argv = ["execute.py", "--cpu", "--base-directory", str(folder)]
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes

    loaded = asyncio.run(nodes.load_custom_node(str(folder / "custom_nodes" / "freq_loss_plugin")))
    assert loaded, "ComfyUI could not load the pack"
    (folder / "temp").mkdir(exist_ok=True)
    for line in sys.stdin:
        file = line.rstrip("\n")
        torch.save([call(nodes.NODE_CLASS_MAPPINGS[node], *rest) for node, *rest in torch.load(file)], file)
        print(file, flush=True)


if __name__ == "__main__":
    main()
