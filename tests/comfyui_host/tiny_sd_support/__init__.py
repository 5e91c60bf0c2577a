"""A custom node pack for tests: lets ComfyUI load the toy model from a checkpoint file, and has nodes to test with.

ComfyUI recognizes models by their widths, and hard-codes those of SD1.5's text encoder and VAE, and groups of 32 in its
normalizations. This pack registers one more supported model, with the configurations in the folder that the environment
variable FREQ_LOSS_TINY_SD names.
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import ClassVar

import comfy.ops
import comfy.patcher_extension
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from comfy import sd1_clip

sys.path.append(str(Path(__file__).resolve().parents[2]))
import packed_layers


class ModelNode:
    """A node that takes a model and returns one."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "execute"
    CATEGORY = "tests"
    EXTRA_INPUTS: ClassVar = {}

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), **cls.EXTRA_INPUTS}}


class CountCalls(ModelNode):
    """Appends a letter to a file in every call of the diffusion model; another ``run`` keeps it from being cached."""

    EXTRA_INPUTS: ClassVar = {"file": ("STRING", {}), "run": ("INT", {})}

    def execute(self, model, file, run):
        def call(executor, *args, **kwargs):
            with Path(file).open("a") as log:
                log.write("x")
            return executor(*args, **kwargs)

        counted = model.clone()
        counted.add_wrapper(comfy.patcher_extension.WrappersMP.APPLY_MODEL, call)
        return (counted,)


class FuseActivations(ModelNode):
    """A model whose feed-forward layers go through core's `linear_input_act`, as those of Wan and LTX-Video do."""

    def execute(self, model):
        fused = model.clone()
        for name, layer in model.model.named_modules():
            if name.endswith(".ff.net"):
                path = f"{name.removesuffix('.net')}.forward"
                fused.add_object_patch(path, functools.partial(self.forward, layer))
        return (fused,)

    @staticmethod
    def forward(net, x):
        return comfy.ops.linear_input_act(net[2], net[0](x), "gelu_tanh")


class Pack(ModelNode):
    """A model whose transformers have linear layers as other node packs quantize them; see `packed_layers`."""

    EXTRA_INPUTS: ClassVar = {"kind": (list(packed_layers.KINDS),)}

    def execute(self, model, kind):
        for name, layer in list(model.model.named_modules()):
            if ".transformer_blocks." in name and isinstance(layer, torch.nn.Linear):
                comfy.utils.set_attr(model.model, name, packed_layers.KINDS[kind](layer))
        return (model.clone(),)


class Copy(ModelNode):
    """Predictions by a copy of the model, as ComfyUI 0.23 and newer distribute them over several GPUs."""

    def execute(self, model):
        other = model.deepclone_multigpu()
        other.model.current_patcher = other
        spread = model.clone()
        spread.model_options["multigpu_clones"] = {model.load_device: other}
        return (spread,)


class AddAudio:
    """A latent with a second one for audio, as in LTX-2."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "execute"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"samples": ("LATENT",)}}

    def execute(self, samples):
        from comfy.nested_tensor import NestedTensor  # 0.3.64 has none

        video = samples["samples"]
        return ({**samples, "samples": NestedTensor((video, video.new_zeros(len(video), 8, 30)))},)


class Attachments:
    """The LoRA metadata attached to a model and to a text encoder, as a text."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "execute"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",)}, "optional": {"clip": ("CLIP",)}}

    def execute(self, model, clip=None):
        patchers = [model, *([clip.patcher] if clip else [])]
        return {"ui": {"text": [json.dumps([patcher.attachments.get("lora_metadata") for patcher in patchers])]}}


class Name:
    """The name of a file, for another node's list."""

    RETURN_TYPES = ("COMBO",)
    FUNCTION = "execute"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"name": ("STRING", {})}}

    def execute(self, name):
        return (name,)


NODE_CLASS_MAPPINGS = {
    f"TinySD_{node.__name__}": node for node in (CountCalls, FuseActivations, Pack, Copy, AddAudio, Attachments, Name)
}

_MODEL = Path(os.environ["FREQ_LOSS_TINY_SD"])


def _config(part):
    return json.loads((_MODEL / part / "config.json").read_text())


UNET, TEXT, VAE = _config("unet"), _config("text_encoder"), _config("vae")


class Operations(comfy.ops.disable_weight_init):
    class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
        def __init__(self, num_groups, num_channels, **named):
            super().__init__(UNET["norm_num_groups"], num_channels, **named)


def quantized_operations(config):
    class Quantized(comfy.ops.mixed_precision_ops(config, torch.float32, full_precision_mm=True)):
        GroupNorm = Operations.GroupNorm

    return Quantized


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
    unet_config: ClassVar = {
        **comfy.supported_models.SD15.unet_config,
        "model_channels": UNET["block_out_channels"][0],
        "context_dim": UNET["cross_attention_dim"],
    }

    def get_model(self, *args, **kwargs):
        self.custom_operations = Operations
        if getattr(self, "quant_config", None):
            self.custom_operations = quantized_operations(self.quant_config)
        return super().get_model(*args, **kwargs)

    def clip_target(self, state_dict=None):
        return comfy.supported_models_base.ClipTarget(NarrowTokenizer, NarrowTextModel)


class NarrowVAE(comfy.sd.VAE):
    """ComfyUI's VAE, with the toy model's widths and groups where the file has them."""

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
