"""Image quality in musubi-tuner: what the run's own VAE makes of the defects of its images and videos.

Latents are cached before a run, so no VAE is loaded in it. The one that the run's arguments name is loaded for as long
as the defects are made, and musubi-tuner's own code encodes with it as it does for the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from freq_loss_plugin import ConfigError, FreqLossConfig, image_files
from freq_loss_plugin.image_quality.measurement import Measurement, Size, measure_image
from freq_loss_plugin.image_quality.noise_schedules import signal_to_noise
from freq_loss_plugin.image_quality.old_caches import warn_of_old
from freq_loss_plugin.image_quality.sizes import covering
from freq_loss_plugin.image_quality.survey import survey
from freq_loss_plugin.image_quality.trained_image import TrainedImage
from freq_loss_plugin.loss.latents import NUM_TRAIN_TIMESTEPS
from freq_loss_plugin.options.image_rules import LEAST
from freq_loss_plugin.training.random_streams import separate_random_stream

from ..image_quality import OPTION, ImageQuality, in_one_process, measure_together
from . import host, image_names
from .trainers import TrainingRun

_BY_HAND = "set least timesteps by hand in [freq_loss.image_quality]"


def check(config: FreqLossConfig, args: argparse.Namespace) -> None:
    """Raise ConfigError where images are to be compared and there is no VAE, or one of images in layers."""
    by_resolution = any(LEAST not in rule for rule in (config.image_rules or {}).values())
    if config.image_quality != "auto" and not by_resolution:
        return
    if getattr(args, "is_layered", False):
        raise ConfigError(
            f"{OPTION} with is_layered: the layers of an image have transparency, with which images are not compared; "
            + _BY_HAND
        )
    if not getattr(args, "vae", None):
        raise ConfigError(
            f"{OPTION}: needs the VAE to compare images, and this run has none, since its latents are cached; add "
            f'vae = "PATH", the one of the caches, or {_BY_HAND}'
        )


def make_quality(run: TrainingRun, config: FreqLossConfig) -> ImageQuality:
    """What is known of the images of a run, whose batches will name what they hold.

    Raises:
        ConfigError: see `freq_loss_plugin.image_quality.survey.survey`.
    """
    names: dict[str, TrainedImage] = {}
    repeats: Counter[str] = Counter()
    others: list[Path] = []
    for dataset in run.datasets:
        sources = image_names.sources_of(dataset)
        repeats += image_names.repeats_of(dataset)
        for item in image_names.items_of(dataset):
            image = _image(dataset, item, sources[item.latent_cache_path])
            names[item.latent_cache_path] = image
            if item.frame_count is None and _has_other_size(image.file, item.original_size):
                others.append(Path(item.latent_cache_path))
    end = getattr(run.args, "max_timestep", None) or NUM_TRAIN_TIMESTEPS
    snr = signal_to_noise(run.family.prediction_type(run.args), None)
    with tempfile.TemporaryDirectory() as folder:
        encode = _Encoder(run, Path(folder)).encode
        found = survey(names.values(), config, encode, snr, end=int(end), measure=measure_together, once=in_one_process)
    old = warn_of_old({Path(cache): image.file for cache, image in names.items()}, others)
    image_names.add_to(run.datasets)
    return ImageQuality(found.with_warnings(old), names, repeats)


@dataclass(frozen=True)
class _Frame(TrainedImage):
    """The frame in the middle of a clip.

    Attributes:
        number: counted as its data source does.
        source: musubi-tuner's data source, which reads videos.
    """

    number: int = 0
    source: Any = field(default=None, compare=False, repr=False)

    @property
    def part(self) -> str:
        """See `TrainedImage`; the numbers of frames depend on the rate."""
        rates = [getattr(self.source, name, None) for name in ("source_fps", "target_fps", "strict_target_fps")]
        return f"frame {self.number} of {rates}"

    def open(self) -> Image.Image:
        """See `TrainedImage`."""
        (frame,) = self.source.get_video_data_from_path(str(self.file), self.number, self.number + 1)
        return Image.fromarray(np.asarray(frame))

    def measure(self) -> Measurement:
        """See `TrainedImage`."""
        return measure_image(self.open(), self.size)


def _image(dataset: Any, item: Any, source: Path) -> TrainedImage:
    if item.frame_count is None:
        return TrainedImage(source, _resized(item))
    first = int(Path(item.latent_cache_path).name.split("_")[-3].split("-")[0])
    return _Frame(source, _resized(item), first + item.frame_count // 2, dataset.datasource)


def _resized(item: Any) -> Size:
    """(width, height) to which an image is resized before it is cropped to its bucket."""
    return covering(item.original_size, item.bucket_size[:2])


def _has_other_size(file: Path, size: Size) -> bool:
    """Whether an image is no longer of the size that it had when its latents were cached, turned or not."""
    try:
        with Image.open(file) as image:
            return sorted(image.size) != sorted(size)
    except image_files.UNREADABLE:
        return False  # measuring it says why


class _Encoder:
    """Encodes images as the script that cached the latents does; loads the VAE for the first one.

    Args:
        run: the run in progress.
        folder: for what that script writes.
    """

    def __init__(self, run: TrainingRun, folder: Path) -> None:
        from accelerate import PartialState  # noqa: PLC0415 - as in `runs`

        self._trainer: Any = run.trainer
        self._args, self._cache = run.args, folder / "encoded.safetensors"
        self._device = PartialState().device
        self._script = importlib.import_module(f"{host.PACKAGE}.{run.family.latent_cache}")
        self._items = importlib.import_module(f"{host.PACKAGE}.dataset.image_video_dataset")
        self._vae: Any = None

    @torch.no_grad()
    def encode(self, image: Image.Image) -> Tensor:
        """The latents of an image, scaled as the model is trained on them, shape (C, H, W)."""
        pixels = np.array(image.convert("RGB"))
        item = self._items.ItemInfo("image", "", image.size, image.size, content=pixels)
        item.latent_cache_path = str(self._cache)
        # FLUX.1 Kontext's insists on one image to edit.
        item.control_content = [pixels] if "kontext" in self._script.__name__ else None
        encode = self._script.encode_and_save_batch
        known = {"batch": [item], "is_layered": False, "arch_full": self._trainer.architecture_full_name}
        others = list(inspect.signature(encode).parameters.values())[1:]
        given = {each.name: known[each.name] for each in others if each.name in known}
        given |= {each.name: None for each in others if each.name not in known and each.default is each.empty}
        with separate_random_stream(OPTION, self._device), contextlib.redirect_stdout(io.StringIO()):
            encode(self._load_vae(), **given)
        (latents,) = (value for key, value in load_file(self._cache).items() if is_latent(key))
        latents = latents.to(torch.float32, copy=True)  # the file is mapped into memory, and written anew
        (scaled,) = self._trainer.scale_shift_latents(latents[None])
        return scaled[:, 0] if scaled.ndim == 4 else scaled  # the only frame

    def _load_vae(self) -> Any:
        if self._vae is None:
            self._vae = self._trainer.load_vae(self._args, vae_dtype=torch.float32, vae_path=self._args.vae)
            self._vae.requires_grad_(False)
            self._vae.eval()
            self._vae.to(self._device)
        return self._vae


def is_latent(key: str) -> bool:
    """Whether an entry of a latent cache is the image itself: latents_32x32_float32, latents_1x32x32_float32."""
    return key.startswith("latents_") and key.split("_")[1][:1].isdigit()
