r"""What is measured on samples and on held-out pictures. All instruments were fixed before any arm was trained.

- log-spectral distance in dB, of all frequencies and of each band (`freq_loss_plugin.compare_spectra`), between samples
  and 256 real pictures of the style; both have been through the VAE. The bands part at a period of 32 pixels, as those
  of the loss do on latents.
- sliced Wasserstein distance of each band of the latents: the mean over 256 random directions of the distance between
  sorted projections, :math:`\left(\int (F_a^{-1} - F_b^{-1})^2\right)^{1/2}`. Source: Rabin et al. 2011.
- kernel distance: the unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3) with a
  Gaussian kernel of width 10 between CLIP features of length 1, times 1000, as CMMD (Jayasumana et al. 2024, arXiv
  2401.09603); the CLIP is the embedded model's, trained on the base style alone.
- structure: the share of samples whose position, colour and shape are those of the prompt, a mean over the three.
  texture: for ``frames`` the share whose pattern (orientation) is that of the prompt; for ``weave`` the share of
  squares with the right period and direction. style: for ``frames`` the share of the border that is framed; for
  ``weave`` as texture. By direct measurement (`freq_loss_plugin.embedded.attributes`).
- held-out loss: plain MSE on held-out pictures, a mean over five timesteps; L_low and L_high on batches of four.
- memorisation: the distance (root mean square, 0..1) of a sample to the nearest training picture over that to the
  nearest of as many held-out ones; below 1 is nearer to the training pictures.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.embedded.attributes import frame_share, measure, weave_agreement
from freq_loss_plugin.embedded.pictures import Scene
from freq_loss_plugin.shaping import split_bands
from freq_loss_plugin.spectra import compare_spectra

STRUCTURE = ("position", "colour", "shape")
DIRECTIONS = 256
KERNEL_WIDTH = 10.0
# Two levels on the latents are five on pictures whose sides are eight times as long: a period of 32 pixels is 2^5; the
# nominal end of the low band is 2^-(J+1).
PIXEL_BANDS = FreqLossConfig(levels=4)


def spectral_distances(samples: Tensor, real: Tensor) -> dict[str, float]:
    """In dB, of pictures of shape (n, 3, H, W)."""
    bands = compare_spectra(samples, real, PIXEL_BANDS).bands
    return {f"spectrum {band.name}": band.distance for band in bands}


def sliced_wasserstein(samples: Tensor, real: Tensor) -> dict[str, float]:
    """Of each band of latents, shape (n, C, h, w)."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, ours, theirs in zip(
        ("low", "high"), split_bands(samples, FreqLossConfig()), split_bands(real, FreqLossConfig()), strict=True
    ):
        width = ours[0].numel()
        directions = torch.randn(width, DIRECTIONS, generator=generator)
        directions = directions / directions.norm(dim=0)
        at = (torch.arange(128) + 0.5) / 128
        quantiles = [torch.quantile(each.flatten(start_dim=1) @ directions, at, dim=0) for each in (ours, theirs)]
        found[f"wasserstein {name}"] = float((quantiles[0] - quantiles[1]).square().mean(dim=0).sqrt().mean())
    return found


def kernel_distance(samples: Tensor, real: Tensor) -> float:
    """Of CLIP features, shape (n, d); may be negative."""
    ours, theirs = (each / each.norm(dim=1, keepdim=True) for each in (samples, real))

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (-torch.cdist(one, other).square() / (2 * KERNEL_WIDTH**2)).exp()

    def within(each: Tensor) -> Tensor:
        matrix, count = kernel(each, each), len(each)
        return (matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1))

    ours, theirs = ours.double(), theirs.double()
    return 1000 * float(within(ours) + within(theirs) - 2 * kernel(ours, theirs).mean())


def attributes(samples: Tensor, scenes: list[Scene], style: str) -> dict[str, float]:
    """Shares, 0..1, of pictures of shape (n, 3, H, W) made for ``scenes``."""
    pictures = [sample.permute(1, 2, 0).numpy() for sample in samples]
    read = [measure(picture, style) for picture in pictures]
    right = {
        name: float(np.mean([each[name] == getattr(scene, name) for each, scene in zip(read, scenes, strict=True)]))
        for name in (*STRUCTURE, "texture")
    }
    if style == "weave":
        right["texture"] = float(np.mean([weave_agreement(picture) for picture in pictures]))
    style_share = right["texture"] if style == "weave" else float(np.mean([frame_share(each) for each in pictures]))
    structure = float(np.mean([right[name] for name in STRUCTURE]))
    return {"structure": structure, **{name: right[name] for name in (*STRUCTURE, "texture")}, "style": style_share}


def memorisation(samples: Tensor, training: Tensor, held_out: Tensor) -> float:
    """Of pictures of shape (n, 3, H, W), 0..1; as many held-out ones as training pictures."""

    def nearest(pictures: Tensor) -> Tensor:
        return torch.cdist(samples.flatten(start_dim=1), pictures.flatten(start_dim=1)).min(dim=1).values

    return float((nearest(training) / nearest(held_out[: len(training)])).mean())
