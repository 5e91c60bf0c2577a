"""Merge bands with gains, or mix the bands of two tensors.

Everything here is linear and keeps the shape and dtype of its input.
"""

from __future__ import annotations

from torch import Tensor

from ..loss.bands import computation_dtype
from ..loss.params import BandSpec


def merge_bands(low: Tensor, high: Tensor, low_gain: float = 1.0, high_gain: float = 1.0) -> Tensor:
    """``low_gain·low + high_gain·high``; with gains of 1 the tensor that was split, up to rounding.

    Raises:
        ValueError: the shapes differ.
    """
    _check_same_shape(low, high, "low", "high")
    return low * low_gain + high * high_gain


def scale_bands(tensor: Tensor, low_gain: float, high_gain: float, spec: BandSpec) -> Tensor:
    """``low_gain·low(x) + high_gain·high(x)``: shape (B, C, H, W) or (B, C, T, H, W), dtype as given.

    Equal gains scale the tensor without splitting it. Errors as in `BandSpec.split`.
    """
    if low_gain == high_gain:
        return tensor * low_gain
    low, high = spec.split(tensor.to(computation_dtype(tensor)))
    return merge_bands(low, high, low_gain, high_gain).to(tensor.dtype)


def mix_bands(low_source: Tensor, high_source: Tensor, spec: BandSpec) -> Tensor:
    """The low band of one tensor with the high band of another: ``high_source + low(low_source - high_source)``.

    Args:
        low_source: shape (B, C, H, W) or (B, C, T, H, W).
        high_source: same shape.
        spec: how they are split; errors as in `BandSpec.split`.

    Raises:
        ValueError: the shapes differ.
    """
    _check_same_shape(low_source, high_source, "low_source", "high_source")
    dtype = computation_dtype(low_source, high_source)
    difference = low_source.to(dtype) - high_source.to(dtype)
    return (high_source.to(dtype) + spec.split(difference).low).to(high_source.dtype)


def _check_same_shape(first: Tensor, second: Tensor, first_name: str, second_name: str) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} has shape {tuple(first.shape)} and {second_name} {tuple(second.shape)}: expected the same "
            "shape"
        )
