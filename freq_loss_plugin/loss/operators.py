"""What computes the bands: the matrix of the wavelet low pass, and the disc of the FFT bands.

Each depends on sizes and options alone, is made once in float64 on the CPU, and is then kept for its device and dtype.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from . import wavelet_library

# One entry per size, device and dtype. Bucketed training meets a few dozen sizes; 512×512 float32 is 1 MiB.
_CACHED_OPERATORS = 128

Function = TypeVar("Function", bound=Callable[..., Any])


def operator(function: Function) -> Function:
    """Cache the result for each size, device and dtype.

    A tensor made under inference_mode could never be used for training afterwards, and these outlive their caller.
    """

    @lru_cache(maxsize=_CACHED_OPERATORS)
    @wraps(function)
    def cached(*arguments: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*arguments)

    return cast(Function, cached)


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


def _use_exact_filters(forward: torch.nn.Module, inverse: torch.nn.Module, wavelet: str) -> None:
    """Replace the library's float32 filters by float64 ones; its analysis filters are stored mirrored."""
    import pywt  # noqa: PLC0415 - FFT bands do without

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
    # fftfreq·n are the integer offsets from the center (H//2, W//2) of the shifted spectrum.
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
