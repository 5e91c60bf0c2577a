"""What sd-scripts' own UNet and text encoder predict once its own networks.lora has loaded a LoRA file.

    python predict.py SD_SCRIPTS MODEL LORA INPUTS RESULT

MODEL is a folder in diffusers layout. INPUTS is a file of torch.save with ``latents``, ``timesteps`` and ``ids``;
RESULT gets the ``prediction`` and how many modules the LoRA has ``matched``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch


@torch.no_grad()
def main() -> None:
    sd_scripts, model, lora, inputs, result = map(Path, sys.argv[1:])
    sys.path.insert(0, str(sd_scripts))
    from launch import narrow_unet

    narrow_unet(model / "unet" / "config.json")
    from library import train_util
    from networks import lora as lora_module

    args = argparse.Namespace(pretrained_model_name_or_path=str(model), v2=False, vae=None)
    text_encoder, vae, unet, _ = train_util._load_target_model(args, torch.float32)
    network, weights = lora_module.create_network_from_weights(1.0, str(lora), vae, text_encoder, unet)
    network.apply_to(text_encoder, unet, True, True)
    told = network.load_state_dict(weights, strict=True)
    given = torch.load(inputs)
    states = text_encoder(given["ids"])[0]
    prediction = unet(given["latents"], given["timesteps"], states).sample
    matched = len(network.unet_loras) + len(network.text_encoder_loras)
    torch.save({"prediction": prediction, "matched": matched, "told": str(told)}, result)


if __name__ == "__main__":
    main()
