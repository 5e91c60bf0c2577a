"""Runs a piece of code inside a real ComfyUI, and prints its variable ``answer`` as JSON.

    python inside.py COMFYUI CODE

``pack(NAME)`` is the module NAME of the pack's nodes/. Nothing is loaded beforehand but ComfyUI's path.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

from checkpoint import import_comfyui

ROOT = Path(__file__).parents[2]


def pack(name: str) -> Any:
    """Import a module as ComfyUI does, in a package that is not called freq_loss_plugin."""
    if "the_pack" not in sys.modules:
        sys.modules["the_pack"] = types.ModuleType("the_pack")
        sys.modules["the_pack"].__path__ = [str(ROOT)]
    return importlib.import_module(f"the_pack.nodes.{name}")


def main() -> None:
    comfyui, code = sys.argv[1:]
    import_comfyui(Path(comfyui))
    scope: dict[str, Any] = {"__name__": "inside", "pack": pack, "types": types}
    exec(code, scope)
    print(json.dumps(scope["answer"]))


if __name__ == "__main__":
    main()
