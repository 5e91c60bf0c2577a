"""Prints the modules of a LoRA file that a narrowed FLUX.2 of ComfyUI does not have, one a line.

python flux_2_modules.py COMFYUI LORA
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors import safe_open

# FLUX.2 Klein, with the sizes of `musubi_launch.FLUX_2`.
SIZES: dict[str, Any] = {"hidden_size": 64, "num_heads": 2, "depth": 1, "depth_single_blocks": 1}
SIZES |= {"axes_dim": [8, 8, 8, 8], "context_in_dim": 32, "in_channels": 128, "out_channels": 128, "patch_size": 1}
SIZES |= {"vec_in_dim": None, "mlp_ratio": 3.0, "theta": 2000, "qkv_bias": False, "guidance_embed": False}
SIZES |= {"txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True, "ops_bias": False}


def main() -> None:
    comfyui, lora = sys.argv[1:]
    sys.path.insert(0, comfyui)
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.lora
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    model: Any = torch.nn.Module()
    model.diffusion_model = Flux(
        image_model="flux2", dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init, **SIZES
    )
    model.model_config = type("Config", (), {"unet_config": SIZES})()
    known = comfy.lora.model_lora_keys_unet(model, {})
    with safe_open(lora, "pt") as file:
        names = list(file.keys())
    print(*sorted({name.rsplit(".lora_", 1)[0] for name in names if ".lora_" in name} - known.keys()), sep="\n", end="")


if __name__ == "__main__":
    main()
