"""Real runs of sd-scripts that continue from weights or a state, validate, or diverge."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from recorded_runs import assert_scalars_are_the_formula, residual_sum

pytestmark = [pytest.mark.sd_scripts, pytest.mark.long]


def test_continues_from_weights(sd_scripts, plain_run, tmp_path):
    settings = {"network_weights": str(plain_run.folder / "lora.safetensors"), "dim_from_weights": True}
    continued = sd_scripts.train(tmp_path / "plain", max_train_steps=2, **settings)
    off = sd_scripts.train(tmp_path / "off", freq_loss={"dist_match": 0}, max_train_steps=2, **settings)
    on = sd_scripts.train(tmp_path / "on", freq_loss={"dist_match": 0.01}, max_train_steps=2, **settings)
    for run in (continued, off, on):
        assert run.returncode == 0, run.output
    torch.testing.assert_close(off.lora, continued.lora, rtol=0, atol=0)
    assert_scalars_are_the_formula(on, dist_match=0.01)


def test_base_weights_are_merged_without_a_hook(sd_scripts, plain_run, tmp_path):
    settings = {"base_weights": [str(plain_run.folder / "lora.safetensors")], "max_train_steps": 2}
    merged = sd_scripts.train(tmp_path / "plain", **settings)
    off = sd_scripts.train(tmp_path / "off", freq_loss={"dist_match": 0}, **settings)
    assert off.returncode == merged.returncode == 0, off.output
    assert off.output.count("off (dist_match = 0)") == 1
    torch.testing.assert_close(off.lora, merged.lora, rtol=0, atol=0)


def test_validation_is_that_of_sd_scripts(sd_scripts, tmp_path):
    """With a learning rate of nearly 0 the predictions do not change, so the validation losses are bit-identical."""
    settings = {"learning_rate": 1e-30, "validation_split": 0.34, "validate_every_n_steps": 1, "max_train_steps": 2}
    settings["gradient_checkpointing"] = True  # reentrant, which forbids autograd.grad through checkpointed layers
    without = sd_scripts.train(tmp_path / "plain", **settings)
    options = {"freq_loss_validation": True, "freq_loss_gradient_ratio": 0.1, "freq_loss_grad_cosine": True}
    on = sd_scripts.train(tmp_path / "on", freq_loss={"dist_match": 0.5, **options}, **settings)
    for run in (without, on):
        assert run.returncode == 0, run.output
    names = [name for name in without.scalars if "validation" in name and "average" in name]
    assert names
    for name in names:
        assert on.scalars[name] == without.scalars[name]
    assert on.scalars["loss/current"] != without.scalars["loss/current"]
    # The band losses of the same passes, as often as sd-scripts validates.
    assert on.scalars.keys() - without.scalars.keys() == {
        *(f"loss/freq_{name}" for name in ("low", "high", "total", "fraction", "weight", "grad_cosine")),
        *(f"loss/validation/freq_{name}" for name in ("low", "high", "spectrum_low", "spectrum_high")),
    }
    validated = [event for event in on.events() if event["kind"] == "pass" and not event["is_train"]]
    inside = [event for event in validated if 200 <= event["timesteps"][0] < 600]
    times = len(on.scalars["loss/validation/freq_low"])
    assert 0 < len(inside) < len(validated)
    assert times == len(without.scalars["loss/validation/step_average"]) + len(
        without.scalars.get("loss/validation/epoch_average", [])
    )
    low = [(oracle.wavelet_bands(residual_sum({"extra": event})[None])[0] ** 2).mean() for event in inside]
    means = np.mean(np.reshape(low, (times, -1)), axis=1)
    assert on.scalars["loss/validation/freq_low"] == pytest.approx(list(means), rel=1e-4)
    assert all(-1 <= cosine <= 1 for cosine in on.scalars["loss/freq_grad_cosine"])


@pytest.mark.versions
def test_resuming_continues_the_sequence_of_timesteps_and_noise(sd_scripts, tmp_path):
    settings = {"save_every_n_steps": 2, "save_state": True, "max_train_steps": 4}
    options = {
        "dist_match": 0.01,
        "freq_loss_gradient_ratio": 0.05,
    }
    whole = sd_scripts.train(tmp_path / "whole", freq_loss=options, **settings)
    state = tmp_path / "whole" / "lora-step00000002-state"
    assert state.is_dir(), whole.output
    resumed = sd_scripts.train(tmp_path / "resumed", freq_loss=options, resume=str(state), **settings)
    assert resumed.returncode == 0, resumed.output
    for late, first in zip(whole.batches()[2:], resumed.batches(), strict=False):
        assert torch.equal(late["extra"]["timesteps"], first["extra"]["timesteps"])
        assert torch.equal(late["extra"]["target"], first["extra"]["target"])
    # So do the averages of the gradient-norm ratio; without them, the weight would follow the first batch alone.
    # (Two earlier batches of three are the same; the third holds other images.)
    weight = whole.scalars["loss/freq_weight"][2]
    assert resumed.scalars["loss/freq_weight"][0] == pytest.approx(weight, rel=0.05)
    (state / "freq_loss_state.safetensors").unlink()
    anew = sd_scripts.train(tmp_path / "anew", freq_loss=options, resume=str(state), **settings)
    assert anew.scalars["loss/freq_weight"][0] != pytest.approx(weight, rel=0.1)
    # sd-scripts without the plug-in can resume from such a state, too.
    without = sd_scripts.train(tmp_path / "plain", resume=str(state), **settings)
    assert without.returncode == 0, without.output


def test_a_diverging_run_stops_and_the_last_file_stays_intact(sd_scripts, tmp_path):
    run = sd_scripts.train(
        tmp_path, freq_loss={"dist_match": 0.003}, learning_rate=1e30, save_every_n_steps=1, max_train_steps=5
    )
    assert run.returncode != 0
    message = run.output[run.output.index("NonFiniteLossError") :]
    for words in ("is not finite in step 2", "timesteps =", "of 512 not finite", "lower the learning rate", "intact"):
        assert words in message
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["lora-step00000001.safetensors"]
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "lora-step00000001.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
