"""LoRAs for a part of a fused layer, on a small FLUX.1 of ComfyUI: beside the layer, and patched in by core.

Run by `comfyui_prompts.in_comfyui`, as ``answer = fused_layers.compare(pack)``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

SIZES: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 4]}
SIZES |= {"context_in_dim": 8, "in_channels": 4, "out_channels": 4, "patch_size": 1, "vec_in_dim": 8, "mlp_ratio": 2.0}
SIZES |= {"theta": 100, "qkv_bias": True, "guidance_embed": False}
BLOCK, SINGLE = "transformer.transformer_blocks.0.attn", "diffusion_model.single_blocks.0.linear1_qkv"


def lora(kind: str, *shape: int) -> dict[str, torch.Tensor]:
    """The tensors of an adapter for a weight of this shape, by their endings."""
    rows, columns = shape
    if kind == "lokr":
        return {"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(rows // 4, columns // 4)}
    if kind == "loha":
        factors = {f"hada_w{n}_a": torch.randn(rows, 2) for n in (1, 2)}
        return factors | {f"hada_w{n}_b": torch.randn(2, columns) for n in (1, 2)}
    ending = {"dora": {"dora_scale": torch.rand(rows, 1)}, "no bias of a part": {"diff_b": torch.randn(rows)}}
    plain = {"lora_A.weight": torch.randn(2, columns), "lora_B.weight": torch.randn(rows, 2)}
    return plain | {"alpha": torch.tensor(1.0)} | ending.get(kind, {})


def make_patcher() -> Any:
    """Core's model patcher of a small FLUX.1 with random weights."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.ops
    from comfy.ldm.flux.model import Flux, FluxParams

    newer = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    model = object.__new__(comfy.model_base.Flux)
    torch.nn.Module.__init__(model)
    model.diffusion_model = Flux(
        image_model="flux", dtype=torch.float32, operations=comfy.ops.disable_weight_init, **SIZES, **newer
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.model_config = SimpleNamespace(unet_config=SIZES)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu)


@torch.no_grad()
def compare(pack: Any) -> dict[str, Any]:
    """For each kind: the differences of two layers' outputs from core's, and what the report says of the LoRA."""
    import comfy.utils

    file = SimpleNamespace(name="fused")
    answer: dict[str, Any] = {}
    for kind in ("lora", "lokr", "loha", "dora", "no bias of a part"):
        patcher = make_patcher()
        parts = {f"{BLOCK}.to_q": (16, 16), f"{BLOCK}.to_v": (16, 16), SINGLE: (48, 16)}
        weights = {f"{name}.{end}": value for name, shape in parts.items() for end, value in lora(kind, *shape).items()}
        match = pack("lora_match").match_modules(weights, patcher, None)
        try:
            branches = pack("lora_branches").lora_branches(file, weights, patcher)
        except ValueError as error:
            answer[kind] = str(error)
            continue
        layers = {comfy.utils.get_attr(patcher.model, path): beside for path, beside in branches.items()}
        x = torch.randn(3, 16)
        bare = [layer(x) for layer in layers]
        with pack("lora_gate").attached(layers, -0.7):
            beside_core = [layer(x) for layer in layers]
        patched, _ = pack("lora_fit").apply_lora(SimpleNamespace(metadata={}), weights, patcher, None, -0.7, 0.0)
        patched.patch_model()
        inside = [layer(x) for layer in layers]
        answer[kind] = {
            "layers": list(branches),
            "error": max(float((a - b).abs().max()) for a, b in zip(beside_core, inside, strict=True)),
            "change": min(float((a - b).abs().max()) for a, b in zip(bare, inside, strict=True)),
            "matched": len(match.matched),
            "unused": list(match.unused),
        }
        patched.unpatch_model()
    wrong = {f"{BLOCK}.to_q.{end}": value for end, value in lora("lora", 16, 16).items()}
    wrong |= {f"{BLOCK}.to_k.{end}": value for end, value in lora("lora", 48, 16).items()}
    match = pack("lora_match").match_modules(wrong, make_patcher(), None)
    answer["wrong size"] = [match.matched, match.wrong_size, sorted(match.weights)]
    return answer
