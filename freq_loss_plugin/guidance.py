r"""The guidance token: a picture's CLIP embedding in place of the last token of its caption.

.. math:: c_{b,n} \leftarrow e(picture_b)

with c the hidden states that the text encoder hands to the U-Net, shape (B, n, d), and e the projected image embedding
of CLIP, not normalised (d = 768 for ViT-L/14, the text width of SD1.x). A LoRA trained so follows the picture's
features, and expects some when it generates: those of a picture, or the mean of its training pictures, which its file
carries.

Source: Real-Fake (Yuan et al. 2023, arXiv 2310.10402) and its public code, in which the option's number is only
compared with 0. So it is here: 8.0, 1.0 and true all mean "on".

The features of ``cat.png`` lie beside it in ``cat.png.clip.safetensors``, with a hash of the picture and the name of
the CLIP that made them; ``python -m freq_loss_plugin extract-features`` writes them.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .options import ConfigError

KEY = "ss_freq_loss_guidance_token"
CLIP_KEY, _MEAN_KEY = "ss_freq_loss_guidance_clip", "ss_freq_loss_guidance_mean"
_ENDING = ".clip.safetensors"
# How many names an error lists.
_SHOWN = 5


@dataclass(frozen=True)
class Features:
    """The features of a set of pictures.

    Attributes:
        by_picture: picture to features, shape (d,), float32.
        clip: which CLIP made them.
        mean: their mean as training sees them, shape (d,).
    """

    by_picture: Mapping[Path, Tensor]
    clip: str
    mean: Tensor

    @property
    def width(self) -> int:
        """d."""
        return len(self.mean)


def replace_last_token(states: Tensor, features: Tensor, strength: float = 1.0) -> Tensor:
    """``c[:, -1] + strength·(e - c[:, -1])`` in the last token, everything else as it is.

    Args:
        states: c, shape (B, n, d).
        features: e, shape (B, d) or (1, d).
        strength: 0 leaves the token, 1 replaces it.

    Returns:
        A new tensor of the shape and dtype of ``states``.

    Raises:
        ValueError: shapes that do not fit.

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


def feature_file(picture: Path) -> Path:
    """Where the features of a picture are; its ending stays in the name, since a.png and a.jpg may lie side by side."""
    return picture.with_name(picture.name + _ENDING)


def is_current(picture: Path, clip: str) -> bool:
    """Whether there are features of this very picture by this CLIP."""
    try:
        _, found = _read(feature_file(picture))
    except FeatureError:
        return False
    return found.get("clip") == clip and _unchanged(picture, found)


def contents(picture: Path, features: Tensor, clip: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a picture's feature file."""
    state = picture.stat()
    metadata = {
        "clip": clip,
        "picture_sha256": _hash(picture),
        "picture_size": str(state.st_size),
        "picture_mtime_ns": str(state.st_mtime_ns),
    }
    return {"features": features.detach().float().cpu().contiguous()}, metadata


class FeatureError(ConfigError):
    """Features are missing, old, or from different models; says of which pictures and how to make them."""


def load(pictures: Mapping[Path, float], command: str) -> Features:
    """The features of all pictures.

    Args:
        pictures: picture to weight in the mean: how often it is shown; 0 leaves it out (regularisation pictures).
        command: what makes the features, for the error.

    Raises:
        FeatureError: some are missing, older than their picture, from different models, or of different widths.
    """
    missing, changed, found = [], [], {}
    clips: dict[str, Path] = {}
    for picture in pictures:
        try:
            features, metadata = _read(feature_file(picture))
        except FeatureError:
            missing.append(picture)
            continue
        if not _unchanged(picture, metadata):
            changed.append(picture)
        clips.setdefault(metadata.get("clip", "an unnamed model"), picture)
        found[picture] = features
    for problem, names in (("have no features yet", missing), ("have changed since their features were made", changed)):
        if names:
            raise FeatureError(
                f"guidance_token: {len(names)} of {len(pictures)} pictures {problem}: {_listed(names)}. "
                f"Make them, then train again:\n\n    {command}\n"
            )
    if len(clips) > 1 or len({len(features) for features in found.values()}) > 1:
        by_whom = "; ".join(f"{clip} (for instance of {picture.name})" for clip, picture in clips.items())
        raise FeatureError(
            f"guidance_token: the features are from different models: {by_whom}. Make all of them with one:\n\n"
            f"    {command}\n"
        )
    weights = torch.tensor([float(weight) for weight in pictures.values()])
    if not found or weights.sum() == 0:
        raise FeatureError("guidance_token: there are no pictures to take features from")
    stacked = torch.stack(list(found.values()))
    return Features(found, next(iter(clips)), (weights[:, None] * stacked).sum(dim=0) / weights.sum())


def check_width(features: Features, text_width: int, command: str) -> None:
    """Raise FeatureError where the features are not as wide as the hidden states of the text encoder."""
    if features.width != text_width:
        raise FeatureError(
            f"guidance_token: the features (CLIP {features.clip}) are {features.width} wide, and the text encoder of "
            f"this model {text_width}. SD1.x needs a CLIP with a projection of 768 (ViT-L/14), SD2.x one of 1024 "
            f"(OpenCLIP ViT-H/14); make them with --clip:\n\n    {command} --clip ...\n"
        )


def extraction_command(sources: Mapping[str, Any]) -> str:
    """What makes the features of the pictures that these options name; those without a value are left out."""
    options = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in sources.items() if value)
    return f"{shlex.quote(sys.executable)} -m freq_loss_plugin extract-features {options}"


def missing(pictures: Iterable[Path]) -> list[Path]:
    """Those of the pictures that have no feature file; looks at names alone."""
    return [picture for picture in pictures if not feature_file(picture).is_file()]


def file_metadata(value: float, features: Features) -> dict[str, str]:
    """What a LoRA file says of its guidance token: the option, the CLIP, and the mean of the training pictures."""
    values = features.mean.float().cpu().numpy().astype("<f4").tobytes()
    return {KEY: str(value), CLIP_KEY: features.clip, _MEAN_KEY: base64.b64encode(values).decode()}


def stored_mean(metadata: Mapping[str, str]) -> Tensor | None:
    """The mean of the training pictures' features that a LoRA file carries, shape (d,); None where it carries none.

    Raises:
        ValueError: what it carries is no such thing.
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
    safetensors: Any = importlib.import_module("safetensors")  # its types say nothing

    try:
        with safetensors.safe_open(str(file), framework="pt", device="cpu") as opened:
            features: Tensor = opened.get_tensor("features")
            metadata: dict[str, str] = dict(opened.metadata() or {})
    except Exception as error:  # a file that is not there, damaged, or something else: it is made again
        raise FeatureError(f"{file}: {error}") from None
    if features.ndim != 1 or not features.isfinite().all():
        raise FeatureError(f"{file}: no features")
    return features, metadata


def _unchanged(picture: Path, metadata: Mapping[str, str]) -> bool:
    """By size and time, and only where the time differs (a copied data set) by content."""
    try:
        state = picture.stat()
    except OSError:
        return False
    if metadata.get("picture_size") != str(state.st_size):
        return False
    return metadata.get("picture_mtime_ns") == str(state.st_mtime_ns) or metadata.get("picture_sha256") == _hash(
        picture
    )


def _hash(picture: Path) -> str:
    return hashlib.sha256(picture.read_bytes()).hexdigest()


def _listed(pictures: list[Path]) -> str:
    more = f", and {len(pictures) - _SHOWN} more" if len(pictures) > _SHOWN else ""
    return ", ".join(str(picture) for picture in pictures[:_SHOWN]) + more
