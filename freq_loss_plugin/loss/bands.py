"""What bands are: a latent split into a low and a high band that add up to it.

Both splits are linear and act on the last two dimensions only, so they commute with sums over the batch; the loss
(`freq_loss_plugin.loss.matching`) rests on that.

**wavelet** — the J-level discrete wavelet transform with zero padding at the border (`mode="zero"`), as
``pytorch_wavelets.DWTForward`` / ``DWTInverse`` define it. The low band is the inverse of the approximation alone, the
high band the inverse of all details alone, cropped to H×W where the inverse is one row or column larger. (Their sum is
the input for every wavelet of PyWavelets but ``dmey``, a truncated filter that misses it by about 1%; the high band is
taken as input - low, so that the bands always add up.) Rows and columns are transformed separately, so the low band of
an image X is

    low(X) = A_H · X · A_W^T

where column j of the n×n matrix A_n is the 1-D low band of the j-th unit vector. `wavelet_low_pass` makes A_n once per
size; afterwards the cost depends neither on the wavelet nor on J.

**fft** — an ideal low pass: on the shifted spectrum, the disc of radius floor(cutoff·min(H, W)) around the zero
frequency at (H//2, W//2), border included; the high band is the rest.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, autocast

from . import wavelet_library
from .operators import check_wavelet, fft_weights, wavelet_low_pass

Method = Literal["wavelet", "fft"]
METHODS: tuple[str, ...] = get_args(Method)

# Beyond this size (images, not latents) A_n would take more memory than it saves time; the transform itself is run.
LARGEST_OPERATOR = 1024


class Bands(NamedTuple):
    """The two bands of a tensor, each of its shape and dtype; ``low + high`` is the tensor."""

    low: Tensor
    high: Tensor


def frequency_decomposition(
    tensor: Tensor, method: Method = "wavelet", wavelet: str = "db3", J: int = 2, *, cutoff: float = 0.25
) -> Bands:
    r"""Split latents (or any image-like tensor) into a low and a high frequency band.

    .. math:: low = A_H X A_W^T \;(wavelet), \qquad low = F^{-1}(disc \cdot F(X)) \;(fft), \qquad high = X - low

    Args:
        tensor: floating point, shape (B, C, H, W), or (B, C, T, H, W) for video latents, which are split frame by
            frame. H and W may be odd, different, and as small as 2. float16 and bfloat16 are computed in float32.
        method: ``"wavelet"`` or ``"fft"``. Where pytorch_wavelets cannot be imported, ``"wavelet"`` becomes ``"fft"``
            with one warning.
        wavelet: any discrete wavelet of PyWavelets (only for ``"wavelet"``).
        J: number of levels, at least 1 (only for ``"wavelet"``).
        cutoff: radius of the disc as a fraction of min(H, W) (only for ``"fft"``).

    Returns:
        `Bands` ``(low, high)``, both of the shape and dtype of ``tensor``; ``low + high == tensor`` up to rounding.

    Raises:
        TypeError: ``tensor`` is not floating point.
        ValueError: another number of dimensions, an unknown method or wavelet, J < 1.

    Example:
        >>> latents = torch.randn(4, 4, 64, 64)
        >>> low, high = frequency_decomposition(latents)
        >>> torch.allclose(low + high, latents, atol=1e-6)
        True
    """
    check_latent(tensor, "tensor")
    method = resolve_method(method)
    if method == "wavelet" and J < 1:
        raise ValueError(f"J = {J}: the number of wavelet levels must be at least 1")
    with autocast(tensor.device.type, enabled=False):
        exact = tensor.to(computation_dtype(tensor))
        low = wavelet_low_band(exact, wavelet, J) if method == "wavelet" else fft_low_band(exact, cutoff)
        return Bands(low.to(tensor.dtype), (exact - low).to(tensor.dtype))


def low_bands(
    tensor: Tensor, method: Method = "wavelet", wavelet: str = "db3", J: int = 2, *, cutoff: float = 0.25
) -> list[Tensor]:
    """The low band after 1, 2, … J levels, the last of them that of `frequency_decomposition`; for fft just that one.

    What level j takes away, its detail band, is the (j - 1)-th entry minus the j-th, with the tensor itself as the
    0-th. Arguments and errors as in `frequency_decomposition`.
    """
    levels = range(1, J + 1) if resolve_method(method) == "wavelet" else [J]
    return [frequency_decomposition(tensor, method, wavelet, level, cutoff=cutoff).low for level in levels]


def wavelet_low_band(tensor: Tensor, wavelet: str, levels: int) -> Tensor:
    """``A_H · X · A_W^T`` over the last two dimensions; differentiable, same shape and dtype."""
    height, width = tensor.shape[-2:]
    if max(height, width) > LARGEST_OPERATOR:
        return _transformed_low_band(tensor, wavelet, levels)
    rows = wavelet_low_pass(height, wavelet, levels, tensor.device, tensor.dtype)
    columns = wavelet_low_pass(width, wavelet, levels, tensor.device, tensor.dtype)
    return rows @ tensor @ columns.T


def fft_low_band(tensor: Tensor, cutoff: float) -> Tensor:
    """The spectrum inside the disc, transformed back; differentiable, same shape and dtype."""
    height, width = tensor.shape[-2:]
    disc = fft_weights(height, width, cutoff, tensor.device, tensor.dtype).disc
    return torch.fft.irfft2(torch.fft.rfft2(tensor) * disc, s=(height, width))


def _transformed_low_band(tensor: Tensor, wavelet: str, levels: int) -> Tensor:
    """The same low band by pytorch_wavelets' 2-D transform and back, which needs no n×n matrix."""
    check_wavelet(wavelet)
    library = wavelet_library.load()
    height, width = tensor.shape[-2:]
    images = tensor.reshape(-1, 1, height, width)
    forward = library.DWTForward(J=levels, wave=wavelet, mode="zero").to(tensor)
    inverse = library.DWTInverse(wave=wavelet, mode="zero").to(tensor)
    approximation, details = forward(images)
    low = inverse((approximation, [torch.zeros_like(detail) for detail in details]))
    return low[..., :height, :width].reshape(tensor.shape)


def resolve_method(method: str) -> Method:
    """The method that will really run: ``"wavelet"`` becomes ``"fft"`` where its package is missing, with one warning.

    Raises:
        ValueError: ``method`` is neither ``"wavelet"`` nor ``"fft"``.
    """
    if method == "fft":
        return "fft"
    if method != "wavelet":
        raise ValueError(f"method = {method!r}: expected one of {', '.join(map(repr, METHODS))}")
    try:
        wavelet_library.load()
    except ImportError as error:
        _warn_fallback(str(error))
        return "fft"
    return "wavelet"


@lru_cache(maxsize=1)
def _warn_fallback(reason: str) -> None:
    warnings.warn(
        f"pytorch_wavelets cannot be imported ({reason}): the wavelet bands fall back to FFT bands. "
        f"To get them, run: {wavelet_library.INSTALL_HINT}",
        stacklevel=4,
    )


def check_latent(tensor: Tensor, name: str) -> None:
    """Raise unless ``tensor`` is floating point and of shape (B, C, H, W) or (B, C, T, H, W)."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}: expected a floating point tensor")
    if tensor.ndim not in (4, 5):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: expected 4 dimensions (B, C, H, W), or 5 (B, C, T, H, W)"
        )


def computation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any input has it, otherwise float32: half precision is too coarse for sums of squares."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
