"""The entry point for ComfyUI; the nodes are in nodes/. The package that pip installs for sd-scripts is without it."""

import sys

# Only inside ComfyUI, which imports this folder as a package named after its path. Where pytest and other tools import
# this file, there is no ComfyUI, and in a folder whose name has a hyphen no package.
if __package__ and "folder_paths" in sys.modules:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
