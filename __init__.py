"""ComfyUI's way in. Everything else is in nodes/; installed by pip for sd-scripts, this file is left out."""

import sys

# Only inside ComfyUI, which imports this folder as a package under a name of its own. pytest and other tools that come
# across this file have neither a ComfyUI around it nor, in a folder with a hyphen, a package.
if __package__ and "folder_paths" in sys.modules:
    try:
        import comfy_api.latest  # noqa: F401
    except ImportError as error:
        raise ImportError("freq_loss_plugin needs ComfyUI 0.3.64 or newer; update ComfyUI") from error

    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
