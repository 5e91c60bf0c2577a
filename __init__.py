"""ComfyUI's way in. Everything else is in nodes/; installed by pip for sd-scripts, this file is left out."""

import sys

# Only inside ComfyUI, which imports this folder as a package under a name of its own. pytest and other tools that come
# across this file have neither a ComfyUI around it nor, in a folder with a hyphen, a package.
if __package__ and "folder_paths" in sys.modules:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
