"""What the equations take: which bands (`BandSpec`), and how the loss weighs them (`LossSpec`)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, get_args

from torch import Tensor

from .bands import METHODS, Bands, Method, check_latent, frequency_decomposition, low_bands, resolve_method
from .operators import check_wavelet, disc_radius

Reduction = Literal["sum", "mean"]
SampleWeighting = Literal["none", "min_snr"]


@dataclass(frozen=True)
class BandSpec:
    """How a tensor is split into a low and a high band; see `freq_loss_plugin.loss.bands`.

    Attributes:
        method: ``"wavelet"`` or ``"fft"``.
        wavelet: any discrete wavelet of PyWavelets; used by wavelet.
        levels: the number of levels J; used by wavelet.
        cutoff: radius of the disc as a fraction of min(H, W); used by fft.

    Raises:
        ValueError: an unknown method or wavelet, or a value outside its range.
    """

    method: Method = "wavelet"
    wavelet: str = "db3"
    levels: int = 2
    cutoff: float = 0.25

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHODS)
        if self.levels < 1:
            raise ValueError(f"levels = {self.levels!r}: expected a whole number >= 1")
        if not 0 < self.cutoff <= 0.5:
            raise ValueError(
                f"cutoff = {self.cutoff!r}: expected a number above 0 and at most 0.5, the highest frequency of a "
                "latent"
            )
        # Without the library the bands are FFT bands, whatever the wavelet; resolve_method warns.
        with contextlib.suppress(ImportError):
            check_wavelet(self.wavelet)

    @property
    def resolved_method(self) -> Method:
        """The method that will run: fft where pytorch_wavelets cannot be imported."""
        return resolve_method(self.method)

    def split(self, tensor: Tensor) -> Bands:
        """The bands of ``tensor``, shape (B, C, H, W) or (B, C, T, H, W).

        Raises:
            ValueError: H or W is too small for the wavelet levels, or as `frequency_decomposition`.
            TypeError: as `frequency_decomposition`.
        """
        self.check_size(*tensor.shape[-2:])
        return frequency_decomposition(tensor, self.method, self.wavelet, self.levels, cutoff=self.cutoff)

    def low_bands(self, tensor: Tensor) -> list[Tensor]:
        """The low band after 1, 2, … J levels; for fft just the one. Errors as in `split`."""
        self.check_size(*tensor.shape[-2:])
        return low_bands(tensor, self.method, self.wavelet, self.levels, cutoff=self.cutoff)

    def boundary(self, height: int, width: int) -> float:
        """Where the low band ends, in cycles per pixel.

        For fft the radius of the disc. A wavelet has no sharp end; each level halves the band, and 2^-(J+1) is its
        nominal one.
        """
        if self.resolved_method == "wavelet":
            return 2.0 ** -(self.levels + 1)
        return disc_radius(height, width, self.cutoff) / min(height, width)

    def check_size(self, height: int, width: int, *, key: str = "levels") -> None:
        """Raise ValueError where H×W is too small for the wavelet levels (2^J > min(H, W)), which it calls ``key``."""
        if self.method == "wavelet" and 2**self.levels > min(height, width):
            most = int(math.log2(min(height, width)))
            fix = f"set {key} = {most}" if most else "use a higher resolution"
            raise ValueError(
                f"{key} = {self.levels}: needs latents of at least {2**self.levels} × {2**self.levels}, and these are "
                f"{height} × {width} (pixels divided by the factor of the VAE, usually 8); {fix}"
            )


@dataclass(frozen=True)
class LossSpec:
    """The frequency term: dist_match · (low_weight·L_low + high_weight·L_high); see `freq_loss_plugin.loss.reference`.

    Attributes:
        bands: how latents are split.
        dist_match: weight of the whole term.
        low_weight: weight of L_low.
        high_weight: weight of L_high.
        reduction: ``"sum"`` over the batch, or ``"mean"``.
        sample_weighting: ``"min_snr"`` multiplies each sample by its Min-SNR weight.
        min_snr_gamma: the cap of the SNR.
        window: (first, end) of the timesteps that count, end exclusive; None for all.

    Raises:
        ValueError: an unknown reduction or sample weighting, or a weight that is negative or not finite.
    """

    bands: BandSpec = field(default_factory=BandSpec)  # made when needed: its check imports PyWavelets
    dist_match: float = 0.003
    low_weight: float = 0.7
    high_weight: float = 0.3
    reduction: Reduction = "sum"
    sample_weighting: SampleWeighting = "none"
    min_snr_gamma: float = 5.0
    window: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("dist_match", "low_weight", "high_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected a finite number >= 0")
        _check_choice("reduction", self.reduction, get_args(Reduction))
        _check_choice("sample_weighting", self.sample_weighting, get_args(SampleWeighting))

    @property
    def loss_spec(self) -> LossSpec:
        """Itself, so that functions take a `LossSpec` and an options object alike."""
        return self


class HasLossSpec(Protocol):
    """A `LossSpec`, or options that make one."""

    @property
    def loss_spec(self) -> LossSpec:
        """What the equations take."""


class FrequencyLoss(NamedTuple):
    """Scalars: ``total`` is weighted and ready to add, ``low`` and ``high`` are L_low and L_high.

    Those of `frequency_matching_loss` carry no gradient in ``low`` and ``high``: it goes through ``total`` alone.
    """

    total: Tensor
    low: Tensor
    high: Tensor


def check_batch(prediction: Tensor, target: Tensor, bands: BandSpec, **per_sample: Tensor | float | None) -> None:
    """Raise unless the latents are alike and large enough, and every value is one for each sample or one for all.

    Raises:
        TypeError: a tensor that is not floating point.
        ValueError: shapes that do not fit, or latents that are too small for the wavelet levels.
    """
    check_latent(prediction, "prediction")
    check_latent(target, "target")
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)} and target {tuple(target.shape)}: expected the same shape"
        )
    for name, values in per_sample.items():
        if isinstance(values, Tensor) and values.numel() not in (1, prediction.shape[0]):
            raise ValueError(
                f"{name} has shape {tuple(values.shape)}: expected one value for each of the {prediction.shape[0]} "
                "samples of the batch, or a single one"
            )
    bands.check_size(prediction.shape[-2], prediction.shape[-1])


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r}: expected one of {', '.join(map(repr, choices))}")
