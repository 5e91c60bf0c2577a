r"""How noisy an image is, by what differs between its color channels.

.. math:: \hat\sigma = \operatorname{quantile}_{blocks} \operatorname{std}(N * (c_1 - c_2)) / \sqrt{2}, \qquad
          N = \frac16 \begin{pmatrix} 1 & -2 & 1 \\ -2 & 4 & -2 \\ 1 & -2 & 1 \end{pmatrix}

Sensor noise is independent in each channel; the finest detail of a texture is nearly the same in all of them. So the
texture of grass or fabric is no noise, and of a grey image nothing is said.

Source: J. Immerkær (1996), Fast noise variance estimation, Computer Vision and Image Understanding 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pixels import as_floats

_BLOCK = 16
# Of a large image, the middle is enough.
_MOST_SIDE = 512
# Of the blocks, the quietest third decides: the rest may have colored detail.
_QUANTILE = 0.3
# Of noise alone, that quantile is so much of its standard deviation.
_EXPECTED = 0.94
# Blocks that are nearly black or white have lost their noise.
_DARKEST, _BRIGHTEST = 0.04, 0.96


def estimate_noise(pixels: Tensor) -> float:
    """Standard deviation of an image's noise in each channel.

    Args:
        pixels: shape (3, H, W), bytes or 0..1.

    Returns:
        On the scale 0..255; 0 for a grey image.
    """
    height, width = (min(side // _BLOCK * _BLOCK, _MOST_SIDE) for side in pixels.shape[1:])
    if min(height, width) < 4 * _BLOCK:
        return 0.0
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    pixels = as_floats(pixels[:, top : top + height, left : left + width])
    middle = pixels.mean(dim=0).unfold(0, _BLOCK, _BLOCK).unfold(1, _BLOCK, _BLOCK).mean(dim=(2, 3))
    lit = (middle > _DARKEST) & (middle < _BRIGHTEST)
    if lit.sum() < 8:
        return 0.0
    differences = torch.stack([pixels[0] - pixels[1], pixels[2] - pixels[1]])
    for _ in range(2):  # N is the second difference along both axes
        second = differences[..., :-2, :] - 2 * differences[..., 1:-1, :] + differences[..., 2:, :]
        differences = second.transpose(1, 2)
    rough = torch.nn.functional.pad(differences / 6, (1, 1, 1, 1))
    blocks = rough.unfold(1, _BLOCK, _BLOCK).unfold(2, _BLOCK, _BLOCK)[:, lit]
    deviations = blocks.square().mean(dim=(-2, -1)).sqrt() / 2**0.5
    return 255 * float(torch.quantile(deviations, _QUANTILE, dim=1).min()) / _EXPECTED
