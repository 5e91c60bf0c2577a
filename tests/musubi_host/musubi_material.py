"""Makes what musubi-tuner trains on: models with random weights, photos, and its caches of latents and texts.

    python musubi_material.py ARCHITECTURE FOLDER

The latents of images are cached by musubi-tuner's own script; those of clips, and all texts, are random numbers in its
own file formats.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from musubi_launch import FLUX_2, WAN_VAE, narrow
from PIL import Image
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parents[1]))  # bad_images

SIDE, IMAGES, FRAMES = 128, 6, 9


def main() -> None:
    architecture, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    (photos if architecture == "flux_2" else clips)(folder / "images")
    with mock.patch("torch.cuda.current_device", return_value=0):
        narrow(architecture)
        (flux_2 if architecture == "flux_2" else wan)(folder)


def photos(folder: Path) -> None:
    """Crops of a photo, with captions."""
    from skimage import data

    folder.mkdir(exist_ok=True)
    pixels = data.astronaut()
    for number in range(IMAGES):
        top, left = 60 * number, 40 * number
        Image.fromarray(np.ascontiguousarray(pixels[top : top + SIDE, left : left + SIDE])).save(
            folder / f"{number}.png"
        )
        (folder / f"{number}.txt").write_text(f"photo {number}")


def clips(folder: Path) -> None:
    """Videos of nine frames, of scenes; those of every second one are enlarged eightfold."""
    import av
    import bad_images

    folder.mkdir(exist_ok=True)
    for number in range(IMAGES):
        frames = [bad_images.scene(number)] * FRAMES
        frames = [bad_images.enlarged(frame, 8) for frame in frames] if number % 2 else frames
        with av.open(str(folder / f"{number}.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=16)  # lossless
            stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "bgr0"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())
        (folder / f"{number}.txt").write_text(f"clip {number}")


def flux_2(folder: Path) -> None:
    """A FLUX.2 Klein and its autoencoder; latents are cached by ``flux_2_cache_latents.py``."""
    from musubi_tuner.dataset import cache_io
    from musubi_tuner.dataset.image_video_dataset import ItemInfo
    from musubi_tuner.flux_2 import flux2_models, flux2_utils

    info = flux2_utils.FLUX2_MODEL_INFO["klein-base-4b"]
    save(flux2_models.Flux2(info.params, "torch", False), folder / "dit.safetensors")
    save(flux2_models.AutoEncoder(flux2_models.AutoEncoderParams()), folder / "vae.safetensors")
    (folder / "cache").mkdir(exist_ok=True)
    for image in sorted((folder / "images").glob("*.png")):
        item = ItemInfo(image.stem, image.with_suffix(".txt").read_text(), (SIDE, SIDE))
        item.text_encoder_output_cache_path = str(folder / "cache" / f"{image.stem}_{info.architecture}_te.safetensors")
        text = torch.randn(7, FLUX_2["context_in_dim"])
        cache_io.save_text_encoder_output_cache_flux_2(item, text, info.architecture_full)


def wan(folder: Path) -> None:
    """A Wan 2.1 of one block and its autoencoder, and caches of clips of nine frames."""
    from musubi_tuner.dataset import cache_io
    from musubi_tuner.dataset.image_video_dataset import ItemInfo
    from musubi_tuner.wan.configs import WAN_CONFIGS
    from musubi_tuner.wan.modules.model import WanModel
    from musubi_tuner.wan.modules.vae import WanVAE_

    config = WAN_CONFIGS["t2v-1.3B"]
    names = ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "text_len", "in_dim", "out_dim", "eps")
    options = {name: getattr(config, name) for name in names}
    save(WanModel(attn_mode="torch", **options), folder / "dit.safetensors")
    save(WanVAE_(z_dim=16, temperal_downsample=[False, True, True], **WAN_VAE), folder / "vae.safetensors")
    (folder / "cache").mkdir(exist_ok=True)
    for number in range(IMAGES):
        stem = folder / "cache" / f"{number}_00000-{FRAMES:03}_{SIDE:04}x{SIDE:04}_wan.safetensors"
        item = ItemInfo(
            f"{number}", f"clip {number}", (SIDE, SIDE), (SIDE, SIDE, FRAMES), FRAMES, latent_cache_path=str(stem)
        )
        item.text_encoder_output_cache_path = str(folder / "cache" / f"{number}_wan_te.safetensors")
        cache_io.save_latent_cache_wan(item, torch.randn(16, 3, SIDE // 8, SIDE // 8), None, None, None)
        cache_io.save_text_encoder_output_cache_wan(item, torch.randn(7, 4096))


def save(model: torch.nn.Module, file: Path) -> None:
    """Random weights, none of them 0: models begin with zeros where a LoRA would get no gradient."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif "norm" not in name and "scale" not in name:
                torch.nn.init.normal_(parameter, std=0.02)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)


if __name__ == "__main__":
    main()
