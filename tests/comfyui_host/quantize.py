"""A checkpoint with quantized linear layers, as ComfyUI 0.33 loads them, and one with the same values unpacked.

    python quantize.py COMFYUI CHECKPOINT FORMAT QUANTIZED UNPACKED

FORMAT is a key of ComfyUI's ``QUANT_ALGOS``: nvfp4, int8_tensorwise, …
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from checkpoint import import_comfyui
from safetensors.torch import load_file, save_file


def main() -> None:
    comfyui, checkpoint, kind, quantized, unpacked = sys.argv[1:]
    import_comfyui(Path(comfyui))
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    packed, plain = {}, {}
    for name, weight in load_file(checkpoint).items():
        packed[name] = plain[name] = weight
        # ComfyUI recognizes the model by the second dimension of attn2.to_k.
        if ".transformer_blocks." not in name or weight.ndim != 2 or ".attn2.to_k." in name:
            continue
        made = QuantizedTensor.from_float(weight, QUANT_ALGOS[kind]["comfy_tensor_layout"])
        del packed[name]
        packed |= made.state_dict(name)
        packed[f"{name.removesuffix('weight')}comfy_quant"] = torch.tensor(
            list(json.dumps({"format": kind}).encode()), dtype=torch.uint8
        )
        plain[name] = made.dequantize()
    for file, weights in ((quantized, packed), (unpacked, plain)):
        save_file({name: weight.contiguous() for name, weight in weights.items()}, file)


if __name__ == "__main__":
    main()
