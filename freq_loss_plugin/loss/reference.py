r"""The frequency distribution-matching loss, to be read; `freq_loss_plugin.loss.matching` is the one that runs.

For a band b in {low, high}, sample weights w_i, clean latents x0_i and their estimates x0_hat_i (see
`freq_loss_plugin.loss.latents`):

    L_b   = mean over (C, H, W) of ( sum_i w_i·band_b(m_i·x0_hat_i) - sum_i w_i·band_b(m_i·x0_i) )²
    total = dist_match · ( low_weight·L_low + high_weight·L_high )

with an optional mask m_i in 0..1, and sum_i divided by the batch size where ``reduction`` is ``"mean"``.

Source: the distribution matching of Real-Fake (Yuan et al. 2023, arXiv 2310.10402) at one timestep per batch, applied
per frequency band; this is the variant that adds to the plain diffusion loss and matches sums, not means.
"""

from __future__ import annotations

from torch import Tensor

from .bands import Bands, computation_dtype
from .latents import PredictionType, recover_latent
from .params import FrequencyLoss, HasLossSpec, Reduction, check_batch
from .sample_weights import batch_weights


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
    config: HasLossSpec,
) -> FrequencyLoss:
    """The formula at the top of `freq_loss_plugin.loss.reference`, step by step: recover, split, sum, compare.

    It is there to be read and to test `frequency_matching_loss` against; training never calls it. Arguments, results
    and errors are those of `frequency_matching_loss`, and ``noisy_latents`` is x_t, of the shape of ``prediction``.
    """
    spec = config.loss_spec
    check_batch(prediction, target, spec.bands, timesteps=timesteps, sigmas=sigmas, sample_weights=sample_weights)
    dtype = computation_dtype(prediction, target)
    weights = batch_weights(prediction_type, timesteps, alphas_cumprod, sigmas, sample_weights, spec)

    def band_sums(model_output: Tensor) -> Bands:
        clean = recover_latent(
            model_output.to(dtype), noisy_latents.to(dtype), timesteps, alphas_cumprod, prediction_type, sigmas=sigmas
        )
        masked = clean if mask is None else clean * mask.to(dtype)
        return Bands(*(_weighted_sum(band, weights, spec.reduction) for band in spec.bands.split(masked)))

    predicted, clean = band_sums(prediction), band_sums(target)
    low = (predicted.low - clean.low).square().mean()
    high = (predicted.high - clean.high).square().mean()
    return FrequencyLoss(spec.dist_match * (spec.low_weight * low + spec.high_weight * high), low, high)


def _weighted_sum(band: Tensor, weights: Tensor | float, reduction: Reduction) -> Tensor:
    """sum_i w_i·band_i, over the batch size where the reduction is the mean."""
    if isinstance(weights, Tensor):
        weights = weights.reshape(-1, *([1] * (band.ndim - 1))).to(device=band.device, dtype=band.dtype)
    weighted: Tensor = band * weights
    return weighted.mean(dim=0) if reduction == "mean" else weighted.sum(dim=0)
