"""Makes what a real sd-scripts run needs and no test may download: a model, a tokenizer and photos.

Also a program: ``python tests/sd_scripts_host/material.py FOLDER [--full-size]`` writes ``FOLDER/model``,
``FOLDER/tokenizers`` and ``FOLDER/photos``.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

# SD1.5's topology at widths that a CPU trains in seconds; the second line is SD1.5 itself.
NARROW = {"unet": (32, 64, 64, 64), "vae": (32, 32, 32, 32), "text": 64, "text_layers": 2, "heads": 4}
FULL = {"unet": (320, 640, 1280, 1280), "vae": (128, 256, 512, 512), "text": 768, "text_layers": 12, "heads": 12}

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "brick", "motorcycle_left")
CAPTIONS = ("a portrait", "a cat", "a cup of coffee", "a rocket", "a brick wall", "a motorcycle")


def make_model(folder: Path, *, full_size: bool = False, prediction_type: str = "epsilon") -> Path:
    """A random-weight SD1.5-shaped checkpoint in diffusers layout."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    widths = FULL if full_size else NARROW
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=widths["unet"],
        cross_attention_dim=widths["text"],
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        block_out_channels=widths["vae"],
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2 if full_size else 1,
        latent_channels=4,
        sample_size=512,
    )
    text = CLIPTextConfig(
        hidden_size=widths["text"],
        intermediate_size=4 * widths["text"],
        num_hidden_layers=widths["text_layers"],
        num_attention_heads=widths["heads"],
        projection_dim=widths["text"],
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=None,
        unet=unet,
        scheduler=DDPMScheduler(**schedule, prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def make_tokenizer(cache: Path) -> Path:
    """CLIP's tokenizer, at the place where sd-scripts looks for it, from the vocabulary in open_clip_torch."""
    import open_clip
    from transformers import CLIPTokenizer

    with gzip.open(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    characters = list(_byte_characters())
    tokens = characters + [character + "</w>" for character in characters]
    tokens += ["".join(merge.split()) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    source = cache / "source"
    source.mkdir(parents=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (source / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        str(source / "vocab.json"), str(source / "merges.txt"), model_max_length=77, pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(cache / "openai_clip-vit-large-patch14")
    return cache


def make_photos(folder: Path, size: int, *, alpha: bool = False) -> Path:
    """The six photos of scikit-image, cropped square, with captions, in kohya's folder layout (one repeat)."""
    import numpy as np
    import skimage
    from PIL import Image

    bundled = Path(skimage.__file__).parent / "data"
    target = folder / "1_photo"
    target.mkdir(parents=True)
    for name, caption in zip(PHOTOS, CAPTIONS, strict=True):
        image = Image.open(next(bundled.glob(f"{name}.*"))).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        if alpha:
            mask = np.zeros((size, size), dtype=np.uint8)
            mask[:, : size // 2] = 255
            image.putalpha(Image.fromarray(mask))
        image.save(target / f"{name}.png")
        (target / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder


def _byte_characters():
    """The printable stand-ins that CLIP's vocabulary uses for the 256 bytes, in its order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full-size", action="store_true", help="SD1.5's own widths (3.4 GB)")
    parser.add_argument("--size", type=int, default=512, help="side of the photos in pixels")
    options = parser.parse_args()
    make_model(options.folder / "model", full_size=options.full_size)
    make_tokenizer(options.folder / "tokenizers")
    make_photos(options.folder / "photos", options.size)
