"""The prediction of ComfyUI's own UNet with a LoRA that its own loader has applied.

    python predict.py COMFYUI MODEL LORA INPUTS RESULT

MODEL is a folder in diffusers layout. INPUTS is a file of torch.save with ``latents``, ``timesteps`` and text
``states``; RESULT gets the ``prediction`` and how many weights the LoRA has ``matched``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from checkpoint import checkpoint, import_comfyui


@torch.no_grad()
def main() -> None:
    comfyui, model, lora, inputs, result = map(Path, sys.argv[1:])
    import_comfyui(comfyui)
    os.environ["FREQ_LOSS_TINY_SD"] = str(model)
    import comfy.sd
    import comfy.utils
    import tiny_sd_support  # noqa: F401 - registers the toy model

    loaded = comfy.sd.load_state_dict_guess_config(checkpoint(model), output_vae=False, output_clip=False)[0]
    given = torch.load(inputs)
    text, texts = comfy.utils.load_torch_file(str(lora), safe_load=True, return_metadata=True)
    adapted, _ = comfy.sd.load_lora_for_models(loaded, None, text, 1.0, 0.0)
    matched = len(adapted.patches)
    adapted.patch_model()
    prediction = adapted.model.diffusion_model(given["latents"], given["timesteps"], given["states"])
    torch.save({"prediction": prediction, "matched": matched, "metadata": texts}, result)


if __name__ == "__main__":
    main()
