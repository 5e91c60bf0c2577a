r"""The guidance token: an image's CLIP embedding in place of the last token of its caption.

.. math:: c_{b,n} \leftarrow e(image_b)

with c the hidden states that the text encoder passes to the UNet, shape (B, n, d), and e the projected image embedding
of CLIP, not normalized (d = 768 for ViT-L/14, the text width of SD1.x). A LoRA trained in this way follows the image's
features and needs some for sampling: those of an image, or the mean over its training images, which its file contains.

Source: Real-Fake (Yuan et al. 2023, arXiv 2310.10402) and its public code, which only checks whether the option's
number is 0. The same holds here: 8.0, 1.0 and true all mean "on".

The features of ``cat.png`` are stored beside it in ``cat.png.clip.safetensors``, with a hash of the image and the
identity of the CLIP that computed them; ``python -m freq_loss_plugin extract-features`` writes them.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ..options.fields import ConfigError

KEY = "ss_freq_loss_guidance_token"
CLIP_KEY, _MEAN_KEY = "ss_freq_loss_guidance_clip", "ss_freq_loss_guidance_mean"
_ENDING = ".clip.safetensors"
# How many file names an error lists.
_MAX_LISTED = 5


@dataclass(frozen=True)
class Features:
    """The features of a set of images.

    Attributes:
        by_image: the features of each image, shape (d,), float32.
        clip: the identity of the CLIP that computed them.
        mean: their weighted mean, shape (d,).
    """

    by_image: Mapping[Path, Tensor]
    clip: str
    mean: Tensor

    @property
    def width(self) -> int:
        """d."""
        return len(self.mean)


def replace_last_token(states: Tensor, features: Tensor, strength: float = 1.0) -> Tensor:
    """Replace the last token by ``c[:, -1] + strength·(e - c[:, -1])``.

    Args:
        states: c, shape (B, n, d).
        features: e, shape (B, d) or (1, d).
        strength: 0 keeps the token, 1 replaces it by e.

    Returns:
        A new tensor of the shape and dtype of ``states``.

    Raises:
        ValueError: the shapes do not match.

    Example:
        >>> states = torch.zeros(2, 77, 768)
        >>> replace_last_token(states, torch.ones(2, 768))[:, -1].mean().item()
        1.0
    """
    if states.ndim != 3 or features.ndim != 2 or features.shape[-1] != states.shape[-1]:
        raise ValueError(
            f"hidden states have shape {tuple(states.shape)} and features {tuple(features.shape)}: expected (B, n, d) "
            "and (B, d) with the same d; features come from a CLIP whose projection is as wide as the text encoder"
        )
    if features.shape[0] not in (1, states.shape[0]):
        raise ValueError(f"{features.shape[0]} features for {states.shape[0]} samples: expected one for each, or one")
    last = states[:, -1]
    token = last + strength * (features.to(states) - last) if strength != 1 else features.to(states).expand_as(last)
    return torch.cat([states[:, :-1], token.unsqueeze(1)], dim=1)


def feature_file(image: Path) -> Path:
    """The path of an image's features; it keeps the image's extension, since a.png and a.jpg may be in one folder."""
    return image.with_name(image.name + _ENDING)


def is_current(image: Path, clip: str) -> bool:
    """Whether an image has features by this CLIP and has not changed since."""
    try:
        _, metadata = _read(feature_file(image))
    except FeatureError:
        return False
    return metadata.get("clip") == clip and _is_unchanged(image, metadata)


def contents(image: Path, features: Tensor, clip: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of an image's feature file.

    Args:
        image: the image.
        features: shape (d,).
        clip: the identity of the CLIP that computed them.
    """
    state = image.stat()
    metadata = {
        "clip": clip,
        "image_sha256": _hash(image),
        "image_size": str(state.st_size),
        "image_mtime_ns": str(state.st_mtime_ns),
    }
    return {"features": features.detach().float().cpu().contiguous()}, metadata


class FeatureError(ConfigError):
    """Features are missing, outdated, or from different models; the message has the command that computes them."""


def load(images: Mapping[Path, float], command: str) -> Features:
    """Load the features of all images.

    Args:
        images: the weight of each image in the mean, its number of repeats; 0 leaves it out (regularization images).
        command: the command that computes the features, for the error message.

    Raises:
        FeatureError: some are missing, older than their image, from different models, or of different widths.
    """
    without, changed, by_image = [], [], {}
    clips: dict[str, Path] = {}
    for image in images:
        try:
            features, metadata = _read(feature_file(image))
        except FeatureError:
            without.append(image)
            continue
        if not _is_unchanged(image, metadata):
            changed.append(image)
        clips.setdefault(metadata.get("clip", "an unnamed model"), image)
        by_image[image] = features
    for problem, names in (
        ("have no features yet", without),
        ("have changed since their features were computed", changed),
    ):
        if names:
            raise FeatureError(
                f"guidance_token: {len(names)} of {len(images)} images {problem}: {_listed(names)}. "
                f"Compute them, then train again:\n\n    {command}\n"
            )
    if len(clips) > 1 or len({len(features) for features in by_image.values()}) > 1:
        models = "; ".join(f"{clip} (for instance {image.name})" for clip, image in clips.items())
        raise FeatureError(
            f"guidance_token: the features are from different models: {models}. Compute all of them with one:\n\n"
            f"    {command}\n"
        )
    weights = torch.tensor([float(weight) for weight in images.values()])
    if not by_image or weights.sum() == 0:
        raise FeatureError("guidance_token: there are no images with features")
    stacked = torch.stack(list(by_image.values()))
    return Features(by_image, next(iter(clips)), (weights[:, None] * stacked).sum(dim=0) / weights.sum())


def check_width(features: Features, text_width: int, command: str) -> None:
    """Check that the features are as wide as the hidden states of the text encoder.

    Args:
        features: the features.
        text_width: the width of the hidden states.
        command: the command that computes the features, for the error message.

    Raises:
        FeatureError: they are not.
    """
    if features.width != text_width:
        raise FeatureError(
            f"guidance_token: the features (CLIP {features.clip}) are {features.width} wide, and the text encoder of "
            f"this model {text_width}. SD1.x needs a CLIP with a projection of 768 (ViT-L/14), SD2.x one of 1024 "
            f"(OpenCLIP ViT-H/14); compute them with --clip:\n\n    {command} --clip ...\n"
        )


def extraction_command(sources: Mapping[str, Any]) -> str:
    """The command that computes the features; ``sources`` are its options, and those without a value are left out."""
    options = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in sources.items() if value)
    return f"{shlex.quote(sys.executable)} -m freq_loss_plugin extract-features {options}"


def missing(images: Iterable[Path]) -> list[Path]:
    """The images without a feature file; checks only whether the file exists."""
    return [image for image in images if not feature_file(image).is_file()]


def file_metadata(value: float, features: Features) -> dict[str, str]:
    """The metadata of a LoRA file: the option guidance_token, the CLIP, and the mean over the training images."""
    values = features.mean.float().cpu().numpy().astype("<f4").tobytes()
    return {KEY: str(value), CLIP_KEY: features.clip, _MEAN_KEY: base64.b64encode(values).decode()}


def stored_mean(metadata: Mapping[str, str]) -> Tensor | None:
    """The mean features of the training images from a LoRA file's metadata, shape (d,); None if there are none.

    Raises:
        ValueError: the entry is damaged.
    """
    text = metadata.get(_MEAN_KEY)
    if text is None:
        return None
    try:
        values = base64.b64decode(text, validate=True)
        mean = torch.frombuffer(bytearray(values), dtype=torch.float32).clone()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{_MEAN_KEY} cannot be read ({error}); the file is damaged") from None
    if not mean.isfinite().all():
        raise ValueError(f"{_MEAN_KEY} holds NaN or infinite values; the file is damaged")
    return mean


def _read(file: Path) -> tuple[Tensor, dict[str, str]]:
    try:
        with safetensors.safe_open(str(file), framework="pt", device="cpu") as opened:
            features: Tensor = opened.get_tensor("features")
            metadata: dict[str, str] = dict(opened.metadata() or {})
    except Exception as error:  # noqa: BLE001 - missing, damaged, or another kind of file: it is computed again
        raise FeatureError(f"{file}: {error}") from None
    if features.ndim != 1 or not features.isfinite().all():
        raise FeatureError(f"{file}: expected finite features of shape (d,)")
    return features, metadata


def _is_unchanged(image: Path, metadata: Mapping[str, str]) -> bool:
    """Compares size and time, and the content only where the time differs, as in a copied data set."""
    try:
        state = image.stat()
    except OSError:
        return False
    if metadata.get("image_size") != str(state.st_size):
        return False
    return metadata.get("image_mtime_ns") == str(state.st_mtime_ns) or metadata.get("image_sha256") == _hash(image)


def _hash(image: Path) -> str:
    return hashlib.sha256(image.read_bytes()).hexdigest()


def _listed(images: list[Path]) -> str:
    more = f", and {len(images) - _MAX_LISTED} more" if len(images) > _MAX_LISTED else ""
    return ", ".join(str(image) for image in images[:_MAX_LISTED]) + more
