"""The parts of the toy model: SD1.5's topology with narrower layers; and its files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

from freq_loss_plugin.toy_model.scenes import SIZE

# SD1.5's. Trainers and samplers hard-code it, so the autoencoder is adapted to it.
SCALING_FACTOR = 0.18215
TEXT_WIDTH = 64
# Channels per group of a group normalization, as many as in SD's autoencoder. With one, the mean of a channel, which
# may carry brightness and hue, would be lost at every layer.
GROUPS = 8

NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "steps_offset": 1,
}


def make_vae() -> AutoencoderKL:
    """The autoencoder: factor 8, four latent channels."""
    return AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=GROUPS,
        sample_size=SIZE,
        scaling_factor=SCALING_FACTOR,
    )


def make_unet() -> UNet2DConditionModel:
    """The UNet, which predicts the noise."""
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=GROUPS,
    )


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """The text encoder, as wide as the UNet's cross-attention."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP whose projection is as wide as the text encoder's hidden states, as ViT-L/14's is for SD1.5."""
    vision = CLIPVisionConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=16,
    )
    text = text_config(tokenizer)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT_WIDTH))


def load_vae(folder: Path, device: torch.device) -> AutoencoderKL:
    """The autoencoder of the model in ``folder``, frozen, in float32."""
    if not (folder / "vae").is_dir():
        raise SystemExit(f"no autoencoder in {folder / 'vae'}: run the stage vae first")
    return AutoencoderKL.from_pretrained(folder / "vae").to(device, torch.float32).requires_grad_(False)


def load_pipeline(folder: Path, device: torch.device) -> StableDiffusionPipeline:
    """The model in ``folder``, in float32."""
    if not (folder / "model_index.json").is_file():
        raise SystemExit(f"no model in {folder}: run the stages vae and unet first")
    return StableDiffusionPipeline.from_pretrained(folder).to(device, torch.float32)


def save_pipeline(
    folder: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Write the model to ``folder`` in diffusers layout and fp16."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**NOISE_SCHEDULE, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    finish(folder)


def finish(folder: Path) -> None:
    """Remove paths of this machine, which do not belong in a published model, and print its size."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    megabytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    print(f"wrote {folder}: {megabytes:.1f} MB")
