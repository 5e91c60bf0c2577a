"""The model: an SD1.x or SD2.x checkpoint, with LoRA layers where sd-scripts has them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ..guidance_token.features import replace_last_token
from ..lora.kohya_format import TEXT_ENCODER, UNET
from ..options.fields import ConfigError
from ..training.random_streams import separate_random_stream
from .dataset import Example, load_pixels
from .settings import USE_SD_SCRIPTS, Settings

# The layers that networks.lora of sd-scripts adapts: every linear layer and 1×1 convolution of the UNet's transformers,
# and every linear layer of the text encoder's.
_BLOCK = r"transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
_TARGETS = {
    UNET: rf".*attentions\.\d+\.(proj_in|proj_out|{_BLOCK})",
    TEXT_ENCODER: r".*encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])",
}
_WIDTHS = {768: "SD1.x", 1024: "SD2.x"}
_HASHED = 64  # values of each tensor that tell a model
_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Model:
    """A loaded model with its LoRA layers.

    Attributes:
        pipeline: diffusers' pipeline; its UNet and text encoder have the LoRA layers.
        scheduler: the noise schedule, 1000 timesteps.
        adapted: the models with LoRA layers, by kohya's prefix; the text encoder only if it is trained.
        device: the device of all parts.
        settings: the training settings.
        identity: a hash of the frozen weights.
    """

    pipeline: StableDiffusionPipeline
    scheduler: DDPMScheduler
    adapted: dict[str, nn.Module]
    device: torch.device
    settings: Settings
    identity: str

    def __post_init__(self) -> None:
        self._cached_states: dict[str, Tensor] = {}

    @torch.no_grad()
    def encode(self, examples: list[Example], seed: int, tick: Callable[[], Any] = lambda: None) -> list[Tensor]:
        """Encode images into scaled latents.

        They are samples of the posterior, as sd-scripts caches them; the noise of image i depends on seed + i only.

        Args:
            examples: the images.
            seed: seed of the noise.
            tick: called after each image.

        Returns:
            For each image a latent of shape (4, h, w), float32, on the CPU.

        Raises:
            ConfigError: a latent is not finite.
        """
        vae = self.pipeline.vae
        latents = []
        for index, example in enumerate(examples):
            posterior = vae.encode(load_pixels(example)[None].to(self.device, vae.dtype)).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed + index))
            sample = posterior.mean + posterior.std * noise.to(posterior.mean)
            latents.append((sample[0] * vae.config.scaling_factor).float().cpu())
            if not latents[-1].isfinite().all():
                raise ConfigError(f"{example.file}: its latent is not finite; the VAE or the image is damaged")
            tick()
        return latents

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        captions: list[str],
        features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the UNet on noised latents.

        Args:
            latents: clean latents, shape (B, 4, h, w).
            timesteps: shape (B,).
            noise: shape (B, 4, h, w).
            captions: B captions.
            features: for the guidance token, shape (B, width); None without one.

        Returns:
            The prediction, float32, and its target, both of the latents' shape.
        """
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prediction = self.pipeline.unet(noisy, timesteps, self.text_states(captions, features)).sample
        if self.settings.prediction_type == "v_prediction":
            return prediction.float(), self.scheduler.get_velocity(latents, noise, timesteps)
        return prediction.float(), noise

    @property
    def text_width(self) -> int:
        """Width of the text encoder's hidden states."""
        return int(self.pipeline.text_encoder.config.hidden_size)

    def text_states(self, captions: list[str], features: Tensor | None = None) -> Tensor:
        """The text encoder's hidden states for captions, shape (B, 77, width).

        Args:
            captions: B captions.
            features: replace the last token, shape (B or 1, width); see `freq_loss_plugin.guidance_token.features`.
        """
        states = self._text_states(captions)
        return states if features is None else replace_last_token(states, features)

    def _text_states(self, captions: list[str]) -> Tensor:
        """Cached if the text encoder is not trained."""
        if TEXT_ENCODER in self.adapted:
            return self._encode_text(captions)
        for caption in set(captions) - self._cached_states.keys():
            with torch.no_grad():
                self._cached_states[caption] = self._encode_text([caption])[0]
        return torch.stack([self._cached_states[caption] for caption in captions])

    def _encode_text(self, captions: list[str]) -> Tensor:
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        ids = tokenizer(
            captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids.to(self.device)
        if self.settings.clip_skip is None:
            return encoder(ids)[0]
        states = encoder(ids, output_hidden_states=True).hidden_states[-self.settings.clip_skip]
        return getattr(encoder, "text_model", encoder).final_layer_norm(states)

    def trainable(self, prefix: str) -> list[nn.Parameter]:
        """The LoRA parameters of one of the ``adapted`` models."""
        return [parameter for parameter in self.adapted[prefix].parameters() if parameter.requires_grad]


def load(settings: Settings, device: torch.device) -> Model:
    """Load the checkpoint, freeze it, and add LoRA layers that change nothing yet.

    The layers are initialized as in sd-scripts: ``lora_down`` from Kaiming's uniform distribution with a = sqrt(5),
    ``lora_up`` with zeros.

    Raises:
        ConfigError: there is no such checkpoint, or it is not one that the engine can train.
    """
    pipeline = _load_pipeline(settings.pretrained_model_name_or_path)
    _check(pipeline, settings)
    identity = _identity_of(pipeline)
    for model in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        model.requires_grad_(False).to(device)
    # The VAE stays in float32: SD1.5's overflows in fp16 for some images.
    for model in (pipeline.unet, pipeline.text_encoder):
        model.to(dtype=_DTYPES[settings.mixed_precision])
    adapted = {UNET: pipeline.unet}
    if settings.learning_rates[1]:
        adapted[TEXT_ENCODER] = pipeline.text_encoder
    with separate_random_stream(f"lora:{settings.seed}", torch.device("cpu")):
        for prefix, model in adapted.items():
            inject_adapter_in_model(
                LoraConfig(r=settings.network_dim, lora_alpha=settings.alpha, target_modules=_TARGETS[prefix]),
                model.cpu(),
            )
            model.to(device).train()
    for model in adapted.values():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if settings.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        if TEXT_ENCODER in adapted:
            encoder = pipeline.text_encoder  # transformers 6 has only the first of these
            enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
            enable({"use_reentrant": False})
    scheduler = DDPMScheduler.from_config(
        pipeline.scheduler.config,
        prediction_type=settings.prediction_type,
        rescale_betas_zero_snr=settings.zero_terminal_snr,
    )
    return Model(pipeline, scheduler, adapted, device, settings, identity)


def image_encoder_of(model: str) -> Path | None:
    """The CLIP that comes with a model in diffusers layout, such as the toy model; None if there is none."""
    folder = Path(model) / "image_encoder"
    return folder if (folder / "config.json").is_file() else None


def _load_pipeline(name: str) -> StableDiffusionPipeline:
    path = Path(name)
    diffusers_logging.disable_progress_bar()
    with suppress(AttributeError):  # transformers 5 has its own progress bars
        transformers_logging.disable_progress_bar()
    options = {"safety_checker": None, "requires_safety_checker": False}
    if path.is_file():
        _check_single_file(path)
        load: Callable[..., Any] = StableDiffusionPipeline.from_single_file
    else:
        _check_folder(path)
        load = StableDiffusionPipeline.from_pretrained
    try:
        # float32 whatever the file holds; the argument for that differs between versions.
        return load(name, **options).to(dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        hint = (
            "a single file needs its configuration and tokenizer from the Hugging Face Hub once; go online, or use a "
            "folder in diffusers layout"
            if path.is_file()
            else "expected a diffusers folder, a .safetensors file, or the name of a repository on the Hugging Face Hub"
        )
        raise ConfigError(f"pretrained_model_name_or_path = {name!r} cannot be loaded: {reason} ({hint})") from error


def _identity_of(pipeline: StableDiffusionPipeline) -> str:
    """A hash of the first values of every tensor: two models differ in nearly all."""
    digest = hashlib.sha256()
    for model in (pipeline.vae, pipeline.unet, pipeline.text_encoder):
        for parameter in model.parameters():
            digest.update(f"{tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().flatten()[:_HASHED].numpy().tobytes())
    return digest.hexdigest()


def _check_folder(path: Path) -> None:
    index = path / "model_index.json"
    if path.is_dir() and not index.is_file():
        raise ConfigError(
            f"pretrained_model_name_or_path = '{path}': a folder without model_index.json is not a diffusers model"
        )
    if index.is_file() and (kind := json.loads(index.read_text(encoding="utf-8")).get("_class_name")) != (
        expected := StableDiffusionPipeline.__name__
    ):
        raise ConfigError(
            f"pretrained_model_name_or_path = '{path}' is a {kind}: expected a {expected} (SD1.x or SD2.x). "
            f"{USE_SD_SCRIPTS}"
        )


def _check_single_file(path: Path) -> None:
    """Check the names of the tensors in the header, without loading the weights."""
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"pretrained_model_name_or_path = '{path}': expected .safetensors; {path.suffix or 'such a'} file may run "
            "code when it is opened. Convert it, for instance with sd-scripts' tools/convert_diffusers20_original_sd.py"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
    except (OSError, SafetensorError):
        raise ConfigError(f"pretrained_model_name_or_path = '{path}' is not a complete safetensors file") from None
    if "model.diffusion_model.input_blocks.0.0.weight" not in names or any("conditioner." in name for name in names):
        raise ConfigError(
            f"pretrained_model_name_or_path = '{path}' is not an SD1.x or SD2.x checkpoint (expected "
            f"model.diffusion_model.input_blocks.0.0.weight, and no SDXL conditioner). {USE_SD_SCRIPTS}"
        )


def _check(pipeline: StableDiffusionPipeline, settings: Settings) -> None:
    name = settings.pretrained_model_name_or_path
    if pipeline.unet.config.in_channels != 4:
        raise ConfigError(
            f"pretrained_model_name_or_path = {name!r} takes {pipeline.unet.config.in_channels} input channels "
            f"(an inpainting model?): expected 4. {USE_SD_SCRIPTS}"
        )
    width = pipeline.unet.config.cross_attention_dim
    family = _WIDTHS.get(width)
    if family and settings.v2 != (family == "SD2.x"):
        raise ConfigError(
            f"v2 = {str(settings.v2).lower()}, and {name!r} is an {family} (text width {width}); "
            f"set v2 = {str(not settings.v2).lower()}"
        )
    declared = pipeline.scheduler.config.get("prediction_type", settings.prediction_type)
    # A single file says nothing of it; diffusers guesses.
    if not Path(name).is_file() and declared != settings.prediction_type:
        expected = str(declared == "v_prediction").lower()
        raise ConfigError(
            f"v_parameterization = {str(settings.v_parameterization).lower()}, and the scheduler of {name!r} has "
            f"prediction_type = {declared!r}; set v_parameterization = {expected}"
        )
