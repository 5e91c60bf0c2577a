"""A custom node pack for tests: lets ComfyUI load the embedded model from a checkpoint file.

ComfyUI knows models by their widths, and hard-codes those of SD1.5's text encoder and VAE, and groups of 32 in its
normalizations. One more supported model is given to it here, with the configurations in the folder that
FREQ_LOSS_TINY_SD names. Nothing of the project's own nodes is in this pack.
"""

import json
import os
from pathlib import Path

import comfy.ops
import comfy.patcher_extension
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import torch
from comfy import sd1_clip


class CountCalls:
    """Writes a letter to a file whenever the diffusion model is called; ``run`` makes each run another one."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "count"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), "file": ("STRING", {}), "run": ("INT", {})}}

    def count(self, model, file, run):
        def call(executor, *arguments, **named):
            with open(file, "a") as log:
                log.write("x")
            return executor(*arguments, **named)

        counted = model.clone()
        counted.add_wrapper(comfy.patcher_extension.WrappersMP.APPLY_MODEL, call)
        return (counted,)


NODE_CLASS_MAPPINGS = {"TinySD_CountCalls": CountCalls}

_MODEL = Path(os.environ["FREQ_LOSS_TINY_SD"])


def _config(part):
    return json.loads((_MODEL / part / "config.json").read_text())


UNET, TEXT, VAE = _config("unet"), _config("text_encoder"), _config("vae")


class Operations(comfy.ops.disable_weight_init):
    class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
        def __init__(self, num_groups, num_channels, **named):
            super().__init__(UNET["norm_num_groups"], num_channels, **named)


class NarrowTokenizer(sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        def tokenizer(**named):
            return sd1_clip.SDTokenizer(str(_MODEL / "tokenizer"), embedding_size=TEXT["hidden_size"], **named)

        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=tokenizer)


class NarrowTextModel(sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        def text_model(**named):
            tokens = {"start": TEXT["bos_token_id"], "end": TEXT["eos_token_id"], "pad": TEXT["pad_token_id"]}
            return sd1_clip.SDClipModel(
                textmodel_json_config=dict(TEXT), special_tokens=tokens, return_projected_pooled=False, **named
            )

        super().__init__(device, dtype, model_options or {}, clip_model=text_model)


class NarrowSD15(comfy.supported_models.SD15):
    unet_config = {  # noqa: RUF012
        **comfy.supported_models.SD15.unet_config,
        "model_channels": UNET["block_out_channels"][0],
        "context_dim": UNET["cross_attention_dim"],
    }

    def get_model(self, *arguments, **named):
        self.custom_operations = Operations
        return super().get_model(*arguments, **named)

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(NarrowTokenizer, NarrowTextModel)


class NarrowVAE(comfy.sd.VAE):
    """ComfyUI's VAE, built with the embedded model's widths and groups where a file has them."""

    def __init__(self, sd=None, device=None, config=None, dtype=None, metadata=None):
        first = (sd or {}).get("encoder.conv_in.weight")
        if first is None or first.shape[0] != VAE["block_out_channels"][0]:
            super().__init__(sd, device, config, dtype, metadata)
            return
        widths = VAE["block_out_channels"]
        layout = {
            "double_z": True,
            "z_channels": VAE["latent_channels"],
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": widths[0],
            "ch_mult": [width // widths[0] for width in widths],
            "num_res_blocks": VAE["layers_per_block"],
            "attn_resolutions": [],
            "dropout": 0.0,
        }
        config = {"params": {"ddconfig": layout, "embed_dim": VAE["latent_channels"]}}
        super().__init__(sd, device, config, dtype, metadata)
        for layer in self.first_stage_model.modules():
            if isinstance(layer, torch.nn.GroupNorm):
                layer.num_groups = VAE["norm_num_groups"]


comfy.supported_models.models.append(NarrowSD15)
comfy.sd.VAE = NarrowVAE
