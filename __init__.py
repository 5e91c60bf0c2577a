"""ComfyUI's way in. Everything else is in nodes/; installed by pip for sd-scripts, this file is left out."""

# ComfyUI imports the folder as a package, under a name of its own. pytest and other tools that come across this file
# import it as a plain module, which has no relative imports.
if __package__:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
