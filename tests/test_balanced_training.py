"""Real runs of sd-scripts with the balanced base loss: several processes, accumulation, bf16, resuming."""

from __future__ import annotations

import pytest
import torch
from balance_oracle import Expected

pytestmark = [pytest.mark.sd_scripts, pytest.mark.long]


def expected_losses(balance, batches_of_processes):
    """The base loss of process 0 after each batch, by the predictions and targets of all processes."""
    losses = []
    for recorded in zip(*batches_of_processes, strict=True):
        residuals = [(batch["base"]["prediction"].double() - batch["base"]["target"].double()) for batch in recorded]
        timesteps = [batch["base"]["timesteps"] for batch in recorded]
        balance.observe(torch.cat(residuals).numpy(), torch.cat(timesteps).tolist())
        losses.append(balance.loss(residuals[0].numpy(), timesteps[0].tolist()))
    return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_by_timestep_in_two_processes_with_accumulation(sd_scripts, tmp_path, precision):
    run = sd_scripts.train(
        tmp_path,
        freq_loss={"dist_match": 0, "freq_loss_balance": "timestep"},
        processes=2,
        gradient_accumulation_steps=2,
        max_train_steps=3,
        mixed_precision=precision,
    )
    assert run.returncode == 0, run.output
    expected = expected_losses(Expected("timestep"), [run.batches(rank) for rank in range(2)])
    assert len(expected) == 6
    assert run.scalars["loss/current"] == pytest.approx(expected, rel=1e-4)
    assert run.metadata["ss_freq_loss_balance"] == "timestep"


def test_by_band_beside_the_term_and_resumed(sd_scripts, tmp_path):
    """The term is that of the model's own prediction; the running means go on where they were."""
    settings = {"save_every_n_steps": 2, "save_state": True, "max_train_steps": 4}
    options = {"dist_match": 0.01, "freq_loss_balance": "band"}
    whole = sd_scripts.train(tmp_path / "whole", freq_loss=options, **settings)
    state = tmp_path / "whole" / "lora-step00000002-state"
    assert state.is_dir(), whole.output
    resumed = sd_scripts.train(tmp_path / "resumed", freq_loss=options, resume=str(state), **settings)
    assert resumed.returncode == 0, resumed.output
    balance = Expected("band")
    logged = [current - term for current, term in zip(*_logged(whole), strict=True)]
    assert logged == pytest.approx(expected_losses(balance, [whole.batches()]), rel=1e-4)
    balance = Expected("band")
    _ = expected_losses(balance, [whole.batches()[:2]])
    current, term = (values[0] for values in _logged(resumed))
    assert current - term == pytest.approx(expected_losses(balance, [resumed.batches()[:1]])[0], rel=1e-4)


def _logged(run):
    return run.scalars["loss/current"], run.scalars["loss/freq_total"]
