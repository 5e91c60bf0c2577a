r"""What is measured on samples and on validation images. All metrics were fixed before any arm was trained.

- log-spectral distance in dB, of all frequencies and of each band (`freq_loss_plugin.analysis.spectra`), between
  samples and 256 real images of the style; both have been through the VAE. The bands meet at a period of 32 pixels, as
  those of the loss do on latents.
- sliced Wasserstein distance of each band of the latents: the mean over 256 random directions of the distance between
  sorted projections, :math:`\left(\int (F_a^{-1} - F_b^{-1})^2\right)^{1/2}`. Source: Rabin et al. 2011.
- kernel distance: the unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3) with a
  Gaussian kernel of width 10 between CLIP features of length 1, times 1000, as CMMD (Jayasumana et al. 2024, arXiv
  2401.09603); the CLIP is the toy model's, trained on the base style alone.
- structure: the fraction of samples whose position, color and shape are those of the prompt, a mean over the three.
  texture: for ``frames`` the fraction whose pattern (orientation) is that of the prompt; for ``weave`` the fraction of
  squares with the right period and direction. style: for ``frames`` the fraction of the border that is framed; for
  ``weave`` as texture. Measured in the pixels (`freq_loss_plugin.toy_model.attributes`).
- validation loss: plain MSE on validation images, a mean over five timesteps; L_low and L_high on batches of four.
- memorization: the distance (root mean square, 0..1) of a sample to the nearest training image, divided by that to the
  nearest of as many validation images; below 1 is nearer to the training images.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from freq_loss_plugin.analysis.spectra import compare_spectra
from freq_loss_plugin.loss.params import BandSpec
from freq_loss_plugin.toy_model.attributes import frame_fraction, measure, weave_agreement
from freq_loss_plugin.toy_model.scenes import Scene

STRUCTURE = ("position", "color", "shape")
DIRECTIONS = 256
KERNEL_WIDTH = 10.0
# A period of 32 pixels is 2^5, and the low band ends at 2^-(J+1) cycles per pixel: J = 4.
PIXEL_BANDS = BandSpec(levels=4)


def spectral_distances(samples: Tensor, real: Tensor) -> dict[str, float]:
    """Log-spectral distances in dB between images of shape (n, 3, H, W)."""
    bands = compare_spectra(samples, real, PIXEL_BANDS).bands
    return {f"spectrum {band.name}": band.distance for band in bands}


def sliced_wasserstein(samples: Tensor, real: Tensor) -> dict[str, float]:
    """The distance of each band of latents, shape (n, C, h, w)."""
    generator = torch.Generator().manual_seed(0)
    levels = (torch.arange(128) + 0.5) / 128
    distances = {}
    bands = zip(("low", "high"), BandSpec().split(samples), BandSpec().split(real), strict=True)
    for name, *pair in bands:
        directions = torch.randn(pair[0][0].numel(), DIRECTIONS, generator=generator)
        directions = directions / directions.norm(dim=0)
        quantiles = [torch.quantile(band.flatten(start_dim=1) @ directions, levels, dim=0) for band in pair]
        distances[f"wasserstein {name}"] = float((quantiles[0] - quantiles[1]).square().mean(dim=0).sqrt().mean())
    return distances


def kernel_distance(samples: Tensor, real: Tensor) -> float:
    """The distance of CLIP features, shape (n, d); an unbiased estimate may be negative."""
    ours, theirs = (F.normalize(features).double() for features in (samples, real))

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (-torch.cdist(one, other).square() / (2 * KERNEL_WIDTH**2)).exp()

    def within(features: Tensor) -> Tensor:
        matrix, count = kernel(features, features), len(features)
        return (matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1))

    return 1000 * float(within(ours) + within(theirs) - 2 * kernel(ours, theirs).mean())


def attributes(samples: Tensor, scenes: list[Scene], style: str) -> dict[str, float]:
    """Fractions, 0..1, of images of shape (n, 3, H, W), 0..1, made for ``scenes``."""
    images = [sample.permute(1, 2, 0).numpy() for sample in samples]
    measured = [measure(image, style) for image in images]
    pairs = list(zip(measured, scenes, strict=True))
    right = {
        name: float(np.mean([words[name] == getattr(scene, name) for words, scene in pairs]))
        for name in (*STRUCTURE, "texture")
    }
    if style == "weave":
        right["texture"] = float(np.mean([weave_agreement(image) for image in images]))
    of_style = right["texture"] if style == "weave" else float(np.mean([frame_fraction(image) for image in images]))
    return {"structure": float(np.mean([right[name] for name in STRUCTURE])), **right, "style": of_style}


def memorization(samples: Tensor, training: Tensor, validation: Tensor) -> float:
    """The ratio of distances of images of shape (n, 3, H, W), 0..1; as many validation images as training images."""

    def nearest(images: Tensor) -> Tensor:
        return torch.cdist(samples.flatten(start_dim=1), images.flatten(start_dim=1)).min(dim=1).values

    return float((nearest(training) / nearest(validation[: len(training)])).mean())
