"""What bands are: a latent split into a low and a high band that add up to it.

Both splits are linear and act on the last two dimensions only, so they commute with sums over the batch; the loss
(`freq_loss_plugin.loss`) rests on that.

**wavelet** — the J-level discrete wavelet transform with zero padding at the border (`mode="zero"`), as
``pytorch_wavelets.DWTForward`` / ``DWTInverse`` define it. The low band is the inverse of the approximation alone, the
high band the inverse of all details alone, cropped to H×W where the inverse is one row or column larger. (Their sum is
the input for every wavelet of PyWavelets but ``dmey``, a truncated filter that misses it by about 1%; the high band is
taken as input - low, so that the bands always add up.) Rows and columns are transformed separately, so the low band of
a picture X is

    low(X) = A_H · X · A_W^T

where column j of the n×n matrix A_n is the 1-D low band of the j-th unit vector. `wavelet_low_pass` makes A_n once per
size; afterwards the cost depends neither on the wavelet nor on J.

**fft** — an ideal low pass: on the shifted spectrum, the disc of radius floor(cutoff·min(H, W)) around the zero
frequency at (H//2, W//2), border included; the high band is the rest.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import torch
from torch import Tensor, autocast

from . import wavelet_library

Method = Literal["wavelet", "fft"]
METHODS: tuple[str, ...] = get_args(Method)

# One entry per size, device and dtype. Bucketed training meets a few dozen sizes; 512×512 float32 is 1 MiB.
_CACHED_OPERATORS = 128

# Beyond this size (pictures, not latents) A_n would take more memory than it saves time; the transform itself is run.
LARGEST_OPERATOR = 1024


Function = TypeVar("Function", bound=Callable[..., Any])


def _constant(function: Function) -> Function:
    """Let `torch.compile` call the function once and keep its result, instead of tracing into it.

    This is what torch.compiler.assume_constant_result does, which would import the compiler for everybody.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def operator(function: Function) -> Function:
    """Remember the result for each size, device and dtype; constant to the compiler, to which a bare cache is not.

    A tensor made under inference_mode could never be used for training afterwards, and these outlive their caller.
    """

    @lru_cache(maxsize=_CACHED_OPERATORS)
    def remembered(*arguments: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*arguments)

    @wraps(function)
    def look_up(*arguments: Any) -> Any:
        return remembered(*arguments)

    # The compiler tells the constants of a graph apart by the name in the code.
    code: Any = look_up
    code.__code__ = code.__code__.replace(co_name=function.__name__)
    for name in ("cache_clear", "cache_info"):
        setattr(look_up, name, getattr(remembered, name))
    return cast(Function, _constant(look_up))


class Bands(NamedTuple):
    """The two bands of a tensor, each of its shape and dtype; ``low + high`` is the tensor."""

    low: Tensor
    high: Tensor


def frequency_decomposition(
    tensor: Tensor, method: Method = "wavelet", wavelet: str = "db3", J: int = 2, *, cutoff: float = 0.25
) -> Bands:
    r"""Split latents (or any picture-like tensor) into a low and a high frequency band.

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


@_constant
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


@operator
def wavelet_low_pass(n: int, wavelet: str, levels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The n×n matrix A whose product with a signal of length n is the signal's low band.

    Made by sending the n unit vectors through pytorch_wavelets' 1-D transform and back without the details, in float64
    on the CPU, then rounded to ``dtype``. Cached: treat the result as read-only.

    Raises:
        ImportError: pytorch_wavelets is not installed.
        ValueError: PyWavelets does not know ``wavelet``.
    """
    check_wavelet(wavelet)
    library = wavelet_library.load()
    forward = library.DWT1DForward(J=levels, wave=wavelet, mode="zero")
    inverse = library.DWT1DInverse(wave=wavelet, mode="zero")
    _use_exact_filters(forward, inverse, wavelet)
    unit_vectors = torch.eye(n, dtype=torch.float64).unsqueeze(0)
    approximation, details = forward(unit_vectors)
    low_bands = inverse((approximation, [torch.zeros_like(detail) for detail in details]))
    # Row j of low_bands is the low band of the j-th unit vector, hence column j of A.
    return low_bands[0, :, :n].T.contiguous().to(dtype).to(device)


class LowPassFactors(NamedTuple):
    """A_n = up · down: ``up`` of shape (n, r) with orthonormal columns, ``down`` of shape (r, n), r the rank of A_n."""

    up: Tensor
    down: Tensor


@operator
def low_pass_factors(n: int, wavelet: str, levels: int, device: torch.device, dtype: torch.dtype) -> LowPassFactors:
    """`wavelet_low_pass` by its singular value decomposition, without the singular values that are 0.

    Arguments and errors as there. Cached: treat the result as read-only.
    """
    matrix = wavelet_low_pass(n, wavelet, levels, torch.device("cpu"), torch.float64)
    left, values, right = torch.linalg.svd(matrix)
    rank = max(1, int((values > 1e-10 * values[0]).sum()))
    up, down = left[:, :rank], values[:rank, None] * right[:rank]
    return LowPassFactors(*(factor.contiguous().to(dtype).to(device) for factor in (up, down)))


def _transformed_low_band(tensor: Tensor, wavelet: str, levels: int) -> Tensor:
    """The same low band by pytorch_wavelets' 2-D transform and back, which needs no n×n matrix."""
    check_wavelet(wavelet)
    library = wavelet_library.load()
    height, width = tensor.shape[-2:]
    pictures = tensor.reshape(-1, 1, height, width)
    forward = library.DWTForward(J=levels, wave=wavelet, mode="zero").to(tensor)
    inverse = library.DWTInverse(wave=wavelet, mode="zero").to(tensor)
    approximation, details = forward(pictures)
    low = inverse((approximation, [torch.zeros_like(detail) for detail in details]))
    return low[..., :height, :width].reshape(tensor.shape)


def _use_exact_filters(forward: torch.nn.Module, inverse: torch.nn.Module, wavelet: str) -> None:
    """Replace the library's float32 filters by float64 ones; its analysis filters are stored mirrored."""
    import pywt

    filters = pywt.Wavelet(wavelet)
    mirrored = {"h0": filters.dec_lo[::-1], "h1": filters.dec_hi[::-1]}
    for module, named in ((forward, mirrored), (inverse, {"g0": filters.rec_lo, "g1": filters.rec_hi})):
        for name, taps in named.items():
            shape = getattr(module, name).shape
            setattr(module, name, torch.tensor(taps, dtype=torch.float64).reshape(shape))


def check_wavelet(wavelet: str) -> None:
    """Raise ValueError, naming the nearest wavelets, unless PyWavelets knows ``wavelet``."""
    known = wavelet_library.discrete_wavelets()
    if wavelet in known:
        return
    import difflib

    nearest = difflib.get_close_matches(wavelet, known, n=3, cutoff=0.3)
    suggestion = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    raise ValueError(
        f"wavelet = {wavelet!r}: not a discrete wavelet of PyWavelets.{suggestion} "
        "Families: haar, db1 to db38, sym2 to sym20, coif1 to coif17, bior1.1 to bior6.8, rbio1.1 to rbio6.8, dmey."
    )


def disc_radius(height: int, width: int, cutoff: float) -> int:
    """floor(cutoff·min(H, W)) in frequency bins. The tiny term keeps 0.29·100, which floats hold as 28.999…, at 29."""
    return math.floor(cutoff * min(height, width) + 1e-9)


class FftWeights(NamedTuple):
    """Weights on the layout of `torch.fft.rfft2`, each of shape (H, W//2 + 1).

    Attributes:
        disc: 1 inside the disc, 0 outside.
        low: what turns squared magnitudes into the energy of the low band.
        high: the same for the high band.
    """

    disc: Tensor
    low: Tensor
    high: Tensor


@operator
def fft_weights(height: int, width: int, cutoff: float, device: torch.device, dtype: torch.dtype) -> FftWeights:
    r"""The disc of the FFT bands, and the weights of Parseval's theorem for each band.

    :math:`\sum_{x} band(x)^2 = \frac{1}{HW} \sum_{k \in band} |F_k|^2` over the full spectrum. The half spectrum holds
    each pair of conjugate columns once, so those count twice.
    """
    # fftfreq·n are the integer offsets from the centre (H//2, W//2) of the shifted spectrum.
    rows = torch.fft.fftfreq(height, d=1 / height, dtype=torch.float64)
    columns = torch.fft.rfftfreq(width, d=1 / width, dtype=torch.float64)
    inside = rows[:, None] ** 2 + columns[None, :] ** 2 <= disc_radius(height, width, cutoff) ** 2
    disc = inside.to(torch.float64)
    multiplicity = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64)
    multiplicity[0] = 1.0
    if width % 2 == 0:
        multiplicity[-1] = 1.0
    multiplicity /= height * width
    weights = disc, disc * multiplicity, (1.0 - disc) * multiplicity
    return FftWeights(*(weight.to(dtype).to(device) for weight in weights))


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
