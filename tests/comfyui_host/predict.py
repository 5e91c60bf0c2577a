"""What ComfyUI's own UNet predicts once its own loader has applied a LoRA file.

    python predict.py COMFYUI MODEL LORA INPUTS RESULT

MODEL is a folder in diffusers layout. INPUTS is a file of torch.save with ``latents``, ``timesteps`` and text
``states``; RESULT gets the ``prediction`` and how many weights the LoRA has ``matched``.

ComfyUI detects models by their widths. The narrow SD1.5 is given to it as one more supported model, and its groups by
operations of its own, an extension point of ComfyUI; nothing of ComfyUI is replaced.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


@torch.no_grad()
def main() -> None:
    comfyui, model, lora, inputs, result = map(Path, sys.argv[1:])
    sys.path.insert(0, str(comfyui))
    sys.argv = ["predict.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.ops
    import comfy.sd
    import comfy.supported_models
    import comfy.utils

    config = json.loads((model / "unet" / "config.json").read_text())

    class NarrowSD15(comfy.supported_models.SD15):
        unet_config = {  # noqa: RUF012
            **comfy.supported_models.SD15.unet_config,
            "model_channels": config["block_out_channels"][0],
            "context_dim": config["cross_attention_dim"],
        }

    class Operations(comfy.ops.disable_weight_init):
        class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
            def __init__(self, num_groups, num_channels, **named):
                super().__init__(config["norm_num_groups"], num_channels, **named)

    comfy.supported_models.models.append(NarrowSD15)
    weights = comfy.utils.load_torch_file(str(model / "unet" / "diffusion_pytorch_model.safetensors"), safe_load=True)
    widths = config["block_out_channels"]
    layout = {
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [config["layers_per_block"]] * len(widths),
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
    }
    names = comfy.utils.unet_to_diffusers(layout)
    renamed = {names[name]: weight.float() for name, weight in weights.items()}
    loaded = comfy.sd.load_diffusion_model_state_dict(renamed, model_options={"custom_operations": Operations})
    given = torch.load(inputs)
    text, texts = comfy.utils.load_torch_file(str(lora), safe_load=True, return_metadata=True)
    adapted, _ = comfy.sd.load_lora_for_models(loaded, None, text, 1.0, 0.0)
    matched = len(adapted.patches)
    adapted.patch_model()
    prediction = adapted.model.diffusion_model(given["latents"], given["timesteps"], given["states"])
    torch.save({"prediction": prediction, "matched": matched, "metadata": texts}, result)


if __name__ == "__main__":
    main()
