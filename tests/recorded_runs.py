"""What the tests with real runs of sd-scripts share: the losses, recomputed from recorded predictions and targets."""

from __future__ import annotations

import hosts
import numpy as np
import oracle
import pytest
import torch

ALPHAS = oracle.stable_diffusion_alphas_cumprod()


def assert_scalars_are_the_formula(
    run,
    *,
    dist_match,
    bands=oracle.wavelet_bands,
    prediction_type="epsilon",
    alphas=ALPHAS,
    weigh=None,
    processes=1,
    accumulation=1,
):
    """Every ``loss/freq_*`` of the run, recomputed in float64 from the predictions and targets of all processes."""
    of_all = list(zip(*(run.batches(rank) for rank in range(processes)), strict=True))
    expected = []
    for recorded in of_all:
        low, high = _band_losses(recorded, bands, prediction_type, alphas, weigh)
        expected.append((recorded[0]["loss"].item(), low, high, dist_match * (0.7 * low + 0.3 * high)))
    # sd-scripts logs after every batch; what it logs before the first optimizer step has no numbers of the term yet.
    assert len(run.scalars["loss/freq_low"]) == len(of_all) - (accumulation - 1) > 0
    for step, of_step in enumerate(np.reshape(expected, (-1, accumulation, 4)).mean(axis=1)):
        base, low, high, total = of_step
        numbers = {"freq_low": low, "freq_high": high, "freq_total": total, "freq_fraction": total / (base + total)}
        for name, value in numbers.items():
            logged = run.scalars[f"loss/{name}"][step * accumulation]
            assert logged == pytest.approx(value, rel=2e-5), (step, name)
    losses = [base + total for base, _, _, total in expected]
    assert run.scalars["loss/current"] == pytest.approx(losses, rel=1e-6)


def _band_losses(recorded, bands, prediction_type, alphas, weigh):
    """L_low and L_high of one batch, by what each process recorded of it."""
    passes = [batch.get("extra", batch["base"]) for batch in recorded]
    used = {key: torch.cat([taken[key] for taken in passes]) for key in ("prediction", "target", "timesteps")}
    prediction, target = (used[key].double().numpy() for key in ("prediction", "target"))
    timesteps = used["timesteps"].tolist()
    weights = torch.cat([batch["loss_weights"] for batch in recorded]).double().numpy()
    if weigh is not None:
        weights = weights * [weigh(t) for t in timesteps]
    mask = None
    if "alpha_masks" in recorded[0]:
        size = prediction.shape[-2:]
        masks = recorded[0]["alpha_masks"].double()[:, None]
        mask = torch.nn.functional.interpolate(masks, size, mode="area").numpy()
    return oracle.loss(
        prediction,
        target,
        np.zeros_like(prediction),
        prediction_type=prediction_type,
        timesteps=timesteps,
        alphas_cumprod=alphas,
        weights=weights,
        bands=bands,
        mask=mask,
    )


def residual_sum(batch):
    """D of a recorded batch at one timestep, epsilon prediction."""
    used = batch["extra"]
    alpha_bar = ALPHAS[used["timesteps"][0]]
    difference = (used["prediction"].double() - used["target"].double()).sum(dim=0).numpy()
    return -((1 - alpha_bar) ** 0.5) / alpha_bar**0.5 * difference


def needs(sd_scripts, file):
    """Skip if this version of sd-scripts lacks a file."""
    if not (sd_scripts.path / file).is_file():
        pytest.skip(f"{hosts.SD_SCRIPTS.title(sd_scripts.path)} has no {file}")
