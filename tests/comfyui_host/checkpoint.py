"""The toy model as one checkpoint in the original layout of SD1.5, for ComfyUI's loader.

python checkpoint.py COMFYUI MODEL FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

CLIP_VOCABULARY = 49408


def import_comfyui(comfyui: Path) -> None:
    """Make ComfyUI's modules importable, for the CPU."""
    sys.path.insert(0, str(comfyui))
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()


def checkpoint(model: Path) -> dict[str, torch.Tensor]:
    """The weights by SD1.5's own names; `import_comfyui` comes first. MODEL is a folder in diffusers layout."""
    import comfy.utils
    from comfy import diffusers_convert

    config = json.loads((model / "unet" / "config.json").read_text())
    widths = config["block_out_channels"]
    names = comfy.utils.unet_to_diffusers(
        {
            "model_channels": widths[0],
            "channel_mult": [width // widths[0] for width in widths],
            "num_res_blocks": [config["layers_per_block"]] * len(widths),
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            "transformer_depth_middle": 1,
        }
    )
    unet = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    text = load_file(model / "text_encoder" / "model.safetensors")
    # ComfyUI's text encoder has CLIP's whole vocabulary, the toy model a smaller one.
    words = text["text_model.embeddings.token_embedding.weight"]
    text["text_model.embeddings.token_embedding.weight"] = F.pad(words, (0, 0, 0, CLIP_VOCABULARY - len(words)))
    vae = diffusers_convert.convert_vae_state_dict(load_file(model / "vae" / "diffusion_pytorch_model.safetensors"))
    weights = {
        **{f"model.diffusion_model.{names[name]}": weight for name, weight in unet.items()},
        **{f"cond_stage_model.transformer.{name}": weight for name, weight in text.items()},
        **{f"first_stage_model.{name}": weight for name, weight in vae.items()},
    }
    return {name: weight.float().contiguous() for name, weight in weights.items()}


def main() -> None:
    comfyui, model, file = map(Path, sys.argv[1:])
    import_comfyui(comfyui)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(checkpoint(model), file)


if __name__ == "__main__":
    main()
