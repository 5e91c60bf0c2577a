r"""The frequency distribution-matching loss, once to be read and once to be run.

For a band b in {low, high}, sample weights w_i, clean latents x0_i and their estimates x0_hat_i (see
`freq_loss_plugin.latents`):

    L_b   = mean over (C, H, W) of ( sum_i w_i·band_b(m_i·x0_hat_i) - sum_i w_i·band_b(m_i·x0_i) )²
    total = dist_match · ( low_weight·L_low + high_weight·L_high )

with an optional mask m_i in 0..1, and sum_i divided by the batch size where ``reduction`` is ``"mean"``.

`reference_loss` does just that. `frequency_matching_loss` uses that everything inside the square is linear: with the k
of `residual_scale`,

    D   = sum_i w_i·k_i·m_i·(prediction_i - target_i)        one tensor of shape (C, H, W)
    L_b = mean of band_b(D)²

so that one tensor is split instead of 2B, and the noisy latents are not needed. For the wavelet bands the low band is
two small matrix products and the high band is D minus it; for the FFT bands Parseval's theorem gives both energies from
the spectrum of D, with no inverse transform.

Source: the distribution matching of Real-Fake (Yuan et al. 2023, arXiv 2310.10402) at one timestep per batch, applied
per frequency band; this is the variant that adds to the plain diffusion loss and matches sums, not means.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, autocast
from torch.utils.weak import WeakTensorKeyDictionary

from .bands import (
    Bands,
    check_latent,
    computation_dtype,
    frequency_decomposition,
)
from .config import FreqLossConfig
from .energies import band_energies, batch_difference
from .latents import (
    NUM_TRAIN_TIMESTEPS,
    PredictionType,
    recover_latent,
    residual_scale,
    select_alpha_bar,
    signal_to_noise,
)
from .memory import ResidualMemory
from .processes import sum_over_processes, there_are_several


class FrequencyLoss(NamedTuple):
    """Scalars: ``total`` is weighted and ready to add, ``low`` and ``high`` are the bare L_low, L_high.

    Those of `frequency_matching_loss` are to be read: the gradient goes through ``total`` alone.
    """

    total: Tensor
    low: Tensor
    high: Tensor


def frequency_matching_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    prediction_type: PredictionType,
    timesteps: Tensor | float | None,
    alphas_cumprod: Tensor | None = None,
    sigmas: Tensor | None = None,
    sample_weights: Tensor | None = None,
    mask: Tensor | None = None,
    config: FreqLossConfig,
    across_processes: bool = False,
    memory: ResidualMemory | None = None,
) -> FrequencyLoss:
    r"""Match the batch sum of predicted clean latents to that of the clean latents, band by band.

    .. math:: total = dist\_match \, (low\_weight \, L_{low} + high\_weight \, L_{high}), \quad
              L_b = \operatorname{mean}\big(band_b(D)^2\big), \quad D = \sum_i w_i k_i m_i (prediction_i - target_i)

    The folded form of `reference_loss`, equal to it up to rounding. Runs in float32 (float64 for float64 input) inside
    any autocast, makes no module, and never waits for the device.

    Args:
        prediction: what the model returned, shape (B, C, H, W) or (B, C, T, H, W).
        target: what it should have returned, same shape.
        prediction_type: ``"epsilon"``, ``"v_prediction"``, ``"flow"`` (the sign of v does not matter: the loss is a
            square), or ``"sample"`` where both are clean latents already.
        timesteps: shape (B,) or one number, on the 0..1000 scale. Not needed for ``"sample"`` outside ``own``.
        alphas_cumprod: alpha_bar, shape (1000,), for epsilon and v_prediction. Keep it on the device of ``timesteps``.
        sigmas: the exact s of flow matching, shape (B,); ``timesteps / 1000`` where left out.
        sample_weights: w_i, shape (B,), for instance the trainer's weights of regularisation images; 1 where left out.
            They multiply the weights that ``config`` asks for (`batch_weights`).
        mask: m, broadcastable to ``prediction``, for instance (B, 1, H, W). It multiplies the latents before they are
            split.
        config: the options. Its ``dist_match`` may be 0: the total is then 0, with a zero gradient.
        memory: the batches before this one (`freq_loss_plugin.memory`), which remembers this one, too.
        across_processes: all processes of a training call this together: with ``scope = "global"`` D is that of all of
            them, and the gradient the one whose mean over the processes is right (see `freq_loss_plugin.processes`).

    Returns:
        `FrequencyLoss` ``(total, low, high)``.

    Raises:
        TypeError: a tensor that is not floating point.
        ValueError: shapes that do not fit, an unknown prediction type, a missing schedule, latents that are too small
            for ``config.levels`` (`ConfigError`).

    Example:
        >>> config = FreqLossConfig(dist_match=0.003)
        >>> prediction, target = torch.randn(4, 4, 64, 64, requires_grad=True), torch.randn(4, 4, 64, 64)
        >>> loss = frequency_matching_loss(prediction, target, prediction_type="flow", timesteps=400, config=config)
        >>> loss.total.backward()
    """
    _check_batch(prediction, target, config, timesteps=timesteps, sigmas=sigmas, sample_weights=sample_weights)
    with autocast(prediction.device.type, enabled=False):
        dtype = computation_dtype(prediction, target)
        coefficients = _coefficients(
            prediction_type,
            timesteps,
            alphas_cumprod,
            sigmas,
            sample_weights,
            config,
            prediction.new_empty(prediction.shape[0], dtype=dtype),
        )
        if mask is not None:
            mask = mask.to(dtype)
        difference = batch_difference(prediction, target, coefficients, mask)
        if across_processes and config.scope == "global" and there_are_several():
            difference = sum_over_processes(difference, len(prediction), mean=config.reduction == "mean")
        if memory is not None:
            difference = memory.join(difference)
        return FrequencyLoss(*band_energies(difference, config, room=prediction.numel()))


def band_error_maps(difference: Tensor, config: FreqLossConfig) -> Bands:
    """Where L_low and L_high come from: the squared bands of D, averaged over everything but the position.

    Args:
        difference: D = sum_i w_i·k_i·(prediction_i - target_i), shape (C, H, W) or (C, T, H, W).
        config: its method, wavelet, levels and cutoff are used.

    Returns:
        `Bands` of shape (H, W) each; their means are L_low and L_high.
    """
    config.check_size(*difference.shape[-2:])
    bands = frequency_decomposition(
        difference.unsqueeze(0), config.method, config.wavelet, config.levels, cutoff=config.cutoff
    )
    return Bands(*(band.square().flatten(end_dim=-3).mean(dim=0) for band in bands))


def reference_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    noisy_latents: Tensor,
    prediction_type: PredictionType,
    timesteps: Tensor | float,
    alphas_cumprod: Tensor | None = None,
    sigmas: Tensor | None = None,
    sample_weights: Tensor | None = None,
    mask: Tensor | None = None,
    config: FreqLossConfig,
) -> FrequencyLoss:
    """The formula at the top of `freq_loss_plugin.loss`, step by step: recover, decompose, sum, compare.

    It is there to be read and to test `frequency_matching_loss` against; training never calls it. Arguments, results
    and errors are those of `frequency_matching_loss`, and ``noisy_latents`` is x_t, of the shape of ``prediction``.
    """
    _check_batch(prediction, target, config, timesteps=timesteps, sigmas=sigmas, sample_weights=sample_weights)
    dtype = computation_dtype(prediction, target)
    weights = batch_weights(prediction_type, timesteps, alphas_cumprod, sigmas, sample_weights, config)

    def band_sums(model_output: Tensor) -> Bands:
        clean = recover_latent(
            model_output.to(dtype), noisy_latents.to(dtype), timesteps, alphas_cumprod, prediction_type, sigmas=sigmas
        )
        masked = clean if mask is None else clean * mask.to(dtype)
        bands = frequency_decomposition(masked, config.method, config.wavelet, config.levels, cutoff=config.cutoff)
        return Bands(*(_weighted_sum(band, weights, config) for band in bands))

    predicted, clean = band_sums(prediction), band_sums(target)
    low = (predicted.low - clean.low).square().mean()
    high = (predicted.high - clean.high).square().mean()
    return _weigh(low, high, config)


def batch_weights(
    prediction_type: PredictionType,
    timesteps: Tensor | float | None,
    alphas_cumprod: Tensor | None,
    sigmas: Tensor | None,
    sample_weights: Tensor | None,
    config: FreqLossConfig,
) -> Tensor | float:
    r"""w_i: the given sample weights times what ``config`` asks for; shape (B,), or a number that holds for all.

    - ``sample_weights = "min_snr"``: `min_snr_weights`.
    - ``timesteps = "own"``: 1 where min_timestep <= t < max_timestep, otherwise 0. (In the other modes the trainer asks
      for the loss of batches at one timestep inside the window alone.)

    Raises:
        ValueError: min_snr for flow or sample, where it is not defined; a window without timesteps.
    """
    weights: Tensor | float = 1.0
    if config.sample_weights == "min_snr":
        weights = min_snr_weights(prediction_type, timesteps, alphas_cumprod, config.min_snr_gamma)
    if config.timesteps == "own":
        weights = weights * _inside_window(timesteps, sigmas, config)
    if sample_weights is not None:
        weights = weights * sample_weights.flatten()
    return weights


def min_snr_weights(
    prediction_type: PredictionType, timesteps: Tensor | float | None, alphas_cumprod: Tensor | None, gamma: float
) -> Tensor | float:
    """Min-SNR weights: min(SNR, gamma)/SNR for epsilon, min(SNR, gamma)/(SNR + 1) for v_prediction.

    SNR = alpha_bar / (1 - alpha_bar).

    Source: Hang et al. 2023 (arXiv 2303.09556), in the form that sd-scripts uses.

    Args:
        prediction_type: ``"epsilon"`` or ``"v_prediction"``.
        timesteps: shape (B,), or one number.
        alphas_cumprod: alpha_bar of the scheduler, shape (1000,).
        gamma: the cap of the SNR, 5 in the paper.

    Returns:
        Shape (B,), or a number for one timestep.

    Raises:
        ValueError: another prediction type, for which they are not defined.
    """
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"freq_loss_sample_weights = 'min_snr' is defined for epsilon and v_prediction, and this model predicts "
            f"{prediction_type!r}; set freq_loss_sample_weights = 'none'"
        )
    alpha_bar = torch.as_tensor(select_alpha_bar(timesteps, alphas_cumprod, prediction_type), dtype=torch.float32)
    snr = cast(Tensor, signal_to_noise(alpha_bar))
    # For epsilon this is min(SNR, gamma)/SNR, written so that it has its limit 1 where SNR is 0.
    weights = (gamma / snr).clamp(max=1.0) if prediction_type == "epsilon" else snr.clamp(max=gamma) / (snr + 1)
    return float(weights) if weights.ndim == 0 and weights.device.type == "cpu" else weights


def _inside_window(timesteps: Tensor | float | None, sigmas: Tensor | None, config: FreqLossConfig) -> Tensor | float:
    if timesteps is None:
        if sigmas is None:
            raise ValueError("freq_loss_timesteps = 'own' needs the timesteps of the batch, and got None")
        timesteps = sigmas * NUM_TRAIN_TIMESTEPS
    if not isinstance(timesteps, Tensor):
        return float(config.min_timestep <= timesteps < config.max_timestep)
    inside = (timesteps >= config.min_timestep) & (timesteps < config.max_timestep)
    return inside.flatten().to(torch.float32)


def _coefficients(
    prediction_type: PredictionType,
    timesteps: Tensor | float | None,
    alphas_cumprod: Tensor | None,
    sigmas: Tensor | None,
    sample_weights: Tensor | None,
    config: FreqLossConfig,
    like: Tensor,
) -> Tensor:
    """w_i·k_i over the reduction: what multiplies each sample's residual in D; a tensor like ``like``, shape (B,).

    For integer timesteps of a schedule it is looked up, so that a step launches one kernel for it instead of a dozen.
    """
    samples = len(like) if config.reduction == "mean" else 1
    of_schedule = prediction_type in ("epsilon", "v_prediction") and isinstance(timesteps, Tensor)
    if of_schedule and alphas_cumprod is not None and not torch.compiler.is_compiling():
        assert isinstance(timesteps, Tensor)
        table = _table(prediction_type, alphas_cumprod, timesteps.device, config, like.dtype, samples)
        at = timesteps.flatten() if timesteps.dtype == torch.int64 else timesteps.long().flatten()
        product: Tensor | float = table.values[at].to(like.device)
        finite = table.finite
    else:
        scale = residual_scale(prediction_type, timesteps, alphas_cumprod, sigmas)
        weights = batch_weights(prediction_type, timesteps, alphas_cumprod, sigmas, None, config)
        finite = not isinstance(scale, Tensor) and scale not in (math.inf, -math.inf)
        product = _product_of(weights, scale, like) / samples
    if sample_weights is not None:
        given = sample_weights.flatten().to(like)
        product = given * product if finite else _product_of(given, product, like)
    return product.expand_as(like) if isinstance(product, Tensor) else torch.full_like(like, product)


def _product_of(weights: Tensor | float, scale: Tensor | float, like: Tensor) -> Tensor | float:
    """w·k, which is 0 where w is, even where k is infinite (epsilon at zero terminal SNR)."""
    if isinstance(scale, Tensor):
        scale = scale.to(like)
    if isinstance(weights, Tensor):
        weights = weights.to(like)
        return torch.where(weights == 0, weights, weights * scale)
    return weights * scale if weights != 0 else 0.0


class _Table(NamedTuple):
    """w_t·k_t of every timestep of a schedule, and whether all of them are finite."""

    values: Tensor
    finite: bool


# By schedule; its version stands in the key, since a scheduler may rescale it in place.
_tables: MutableMapping[Tensor, dict[tuple[Any, ...], _Table]] = WeakTensorKeyDictionary()


def _table(
    prediction_type: PredictionType,
    alphas_cumprod: Tensor,
    device: torch.device,
    config: FreqLossConfig,
    dtype: torch.dtype,
    samples: int,
) -> _Table:
    known = _tables.setdefault(alphas_cumprod, {})
    version = 0 if alphas_cumprod.is_inference() else alphas_cumprod._version
    key = version, prediction_type, device, config, dtype, samples
    if key not in known:
        with torch.inference_mode(False), torch.no_grad():
            every = torch.arange(len(alphas_cumprod), device=device)
            scale = residual_scale(prediction_type, every, alphas_cumprod)
            weights = batch_weights(prediction_type, every, alphas_cumprod, None, None, config)
            like = torch.empty(len(every), device=device, dtype=dtype)
            values = torch.as_tensor(_product_of(weights, scale, like) / samples)
            known[key] = _Table(values, bool(values.isfinite().all()))
    return known[key]


def _weighted_sum(band: Tensor, weights: Tensor | float, config: FreqLossConfig) -> Tensor:
    """sum_i w_i·band_i, over the batch size where the reduction is the mean."""
    if isinstance(weights, Tensor):
        weights = weights.reshape(-1, *([1] * (band.ndim - 1))).to(device=band.device, dtype=band.dtype)
    weighted: Tensor = band * weights
    return weighted.mean(dim=0) if config.reduction == "mean" else weighted.sum(dim=0)


def _weigh(low: Tensor, high: Tensor, config: FreqLossConfig) -> FrequencyLoss:
    total = config.dist_match * (config.low_weight * low + config.high_weight * high)
    return FrequencyLoss(total, low, high)


def _check_batch(
    prediction: Tensor, target: Tensor, config: FreqLossConfig, **per_sample: Tensor | float | None
) -> None:
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
    config.check_size(prediction.shape[-2], prediction.shape[-1])
