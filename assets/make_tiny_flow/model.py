r"""The flow-matching toy model: an autoencoder, a text encoder and a small SD3.

With clean latents z0, noise n and t in 0..1

.. math:: z_t = (1 - t) z_0 + t \, n, \qquad \text{prediction} \to n - z_0

Source: Liu et al. (2022), arXiv 2209.03003; the transformer is that of Esser et al. (2024), arXiv 2403.03206.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

FOLDER = Path(__file__).resolve().parents[1] / "tiny_flow"
SIDE, FACTOR, CHANNELS = 64, 4, 4
WIDTH, HEADS, LAYERS, TEXT_WIDTH, TEXT_LENGTH = 160, 5, 6, 128, 16


class TinyFlow(nn.Module):
    """All parts.

    Args:
        tokenizer: of the captions.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.vae = make_vae()
        self.text_encoder = CLIPTextModel(_text_config(tokenizer))
        self.transformer = SD3Transformer2DModel(
            sample_size=SIDE // FACTOR,
            patch_size=2,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=LAYERS,
            attention_head_dim=WIDTH // HEADS,
            num_attention_heads=HEADS,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            pos_embed_max_size=SIDE // FACTOR // 2,
            qk_norm="rms_norm",
        )

    def text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Hidden states, shape (B, 16, 128), and those of the last token, shape (B, 128)."""
        padded = self.tokenizer(
            list(captions), padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        )
        encoded = self.text_encoder(padded.input_ids.to(self.device))
        return encoded.last_hidden_state, encoded.pooler_output

    def velocity(self, noisy: Tensor, t: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """The prediction for latents z_t, shape (B, 4, 16, 16), at t in 0..1, shape (B,)."""
        return self.transformer(noisy, text[0], text[1], 1000 * t).sample

    @torch.no_grad()
    def sample(self, captions: Sequence[str], noise: Tensor, *, steps: int = 20, guidance: float = 3.0) -> Tensor:
        """Latents by Euler's method, shape (B, 4, 16, 16).

        Args:
            captions: one for each.
            noise: the start, shape (B, 4, 16, 16).
            steps: of equal length from t = 1 to 0.
            guidance: of classifier-free guidance; 1 for none.
        """
        text, latents = self.text(captions), noise
        if guidance != 1:
            without = self.text([""] * len(captions))
            text = torch.cat((text[0], without[0])), torch.cat((text[1], without[1]))
        for step in range(steps):
            t = latents.new_full((len(latents),), 1 - step / steps)
            if guidance == 1:
                velocity = self.velocity(latents, t, text)
            else:
                both = self.velocity(torch.cat((latents, latents)), torch.cat((t, t)), text)
                conditional, unconditional = both.chunk(2)
                velocity = unconditional + guidance * (conditional - unconditional)
            latents = latents - velocity / steps
        return latents

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Scaled means of the posterior, of pixels in 0..1, shape (B, 3, H, W)."""
        means = [self.vae.encode(part * 2 - 1).latent_dist.mean for part in pixels.to(self.device).split(16)]
        return torch.cat(means) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in 0..1, shape (B, 3, H, W), on the CPU."""
        parts = [self.vae.decode(part / self.vae.config.scaling_factor).sample for part in latents.split(16)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1).cpu()

    @property
    def device(self) -> torch.device:
        """Of all parts."""
        return next(self.transformer.parameters()).device

    def save(self, folder: Path = FOLDER) -> None:
        """Write all parts in fp16."""
        self.tokenizer.save_pretrained(folder / "tokenizer")
        for name in ("vae", "text_encoder", "transformer"):
            getattr(self, name).half().save_pretrained(folder / name)
        self.float()


def load(folder: Path = FOLDER) -> TinyFlow:
    """The model in ``folder``, in float32.

    Raises:
        SystemExit: there is none.
    """
    if not (folder / "transformer").is_dir():
        raise SystemExit(f"no model in {folder}: run the stages vae and flow of assets/train_tiny_flow.py first")
    model = TinyFlow(CLIPTokenizer.from_pretrained(folder / "tokenizer"))
    model.vae = AutoencoderKL.from_pretrained(folder / "vae").float()
    model.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").float()
    model.transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer").float()
    return model.eval()


def make_vae() -> AutoencoderKL:
    """The autoencoder: factor 4 and four channels compress 12 times, as those of FLUX and SD3 do."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=1.0,
    )


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
