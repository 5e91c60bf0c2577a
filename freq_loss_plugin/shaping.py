"""What can be done with bands outside a loss: taken apart, put together with gains, and taken from two sources.

Everything here is linear and keeps the shape and dtype of its input. ``config`` gives the method, wavelet, levels and
cutoff; these are the bands of the loss.
"""

from __future__ import annotations

from torch import Tensor

from .bands import Bands, computation_dtype, frequency_decomposition
from .config import FreqLossConfig


def split_bands(tensor: Tensor, config: FreqLossConfig) -> Bands:
    """`frequency_decomposition` with the options of ``config``.

    Args:
        tensor: floating point, shape (B, C, H, W) or (B, C, T, H, W).
        config: its method, wavelet, levels and cutoff are used.

    Returns:
        `Bands` ``(low, high)``, which add up to ``tensor``.

    Raises:
        ConfigError: H or W is too small for the wavelet levels.
        TypeError, ValueError: as `frequency_decomposition`.
    """
    config.check_size(*tensor.shape[-2:])
    return frequency_decomposition(tensor, config.method, config.wavelet, config.levels, cutoff=config.cutoff)


def merge_bands(low: Tensor, high: Tensor, low_gain: float = 1.0, high_gain: float = 1.0) -> Tensor:
    """``low_gain·low + high_gain·high``; with gains of 1 the tensor that was split, up to rounding.

    Raises:
        ValueError: two shapes.
    """
    _check_same_shape(low, high, "low", "high")
    return low * low_gain + high * high_gain


def scale_bands(tensor: Tensor, low_gain: float, high_gain: float, config: FreqLossConfig) -> Tensor:
    """``low_gain·low(x) + high_gain·high(x)``: shape (B, C, H, W) or (B, C, T, H, W), dtype as given.

    Gains that are equal scale the tensor, and nothing is split. Errors as in `split_bands`.
    """
    if low_gain == high_gain:
        return tensor * low_gain
    low, high = split_bands(tensor.to(computation_dtype(tensor)), config)
    return merge_bands(low, high, low_gain, high_gain).to(tensor.dtype)


def mix_bands(low_source: Tensor, high_source: Tensor, config: FreqLossConfig) -> Tensor:
    """The low band of one tensor with the high band of another: ``high_source + low(low_source - high_source)``.

    Args:
        low_source: shape (B, C, H, W) or (B, C, T, H, W).
        high_source: same shape.
        config: as in `split_bands`, whose errors are also raised here.

    Raises:
        ValueError: two shapes.
    """
    _check_same_shape(low_source, high_source, "low_source", "high_source")
    dtype = computation_dtype(low_source, high_source)
    difference = low_source.to(dtype) - high_source.to(dtype)
    return (high_source.to(dtype) + split_bands(difference, config).low).to(high_source.dtype)


def _check_same_shape(first: Tensor, second: Tensor, first_name: str, second_name: str) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} has shape {tuple(first.shape)} and {second_name} {tuple(second.shape)}: expected the same "
            "shape"
        )
