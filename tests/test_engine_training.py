"""One training step of the engine: its losses are the formula, its gradients those of the sum."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracle
import pytest
import torch
from engine_runs import OFF, ON, load_lora

from freq_loss_plugin.engine import dataset, model, run, trainer

# Warnings of diffusers, transformers and accelerate are not ours.
pytestmark = pytest.mark.filterwarnings("default")


def record_passes(monkeypatch):
    """A list that fills with (timesteps, prediction, target) of every pass of the model, in float64."""
    passes, predict = [], model.Model.predict

    def recording(self, latents, timesteps, *others):
        results = predict(self, latents, timesteps, *others)
        passes.append((timesteps.clone(), *(tensor.detach().double().numpy() for tensor in results)))
        return results

    monkeypatch.setattr(model.Model, "predict", recording)
    return passes


def expected_losses(passes, loss, gamma, alphas):
    """(base, L_low, L_high) of every batch by the oracle."""
    if loss.enabled and loss.timesteps == "unified":
        pairs = list(zip(passes[::2], passes[1::2], strict=True))  # the extra pass comes first
        assert all(len(set(extra[0].tolist())) == 1 and 200 <= extra[0][0] < 600 for extra, _ in pairs)
    else:
        pairs = [(passed, passed) for passed in passes]
    for (timesteps, prediction, target), (base_timesteps, base_prediction, base_target) in pairs:
        alpha_bar = alphas[base_timesteps.numpy()]
        snr = alpha_bar / (1 - alpha_bar)
        weights = np.minimum(gamma / snr, 1) if gamma else np.ones(len(snr))
        base = (((base_prediction - base_target) ** 2).mean(axis=(1, 2, 3)) * weights).mean()
        has_term = loss.enabled
        if loss.timesteps == "shared":
            inside = (timesteps >= 200) & (timesteps < 600)
            assert len(set(timesteps.tolist())) == 1 if inside.all() else not inside.any()
            has_term = bool(inside.all())
        low, high = oracle.loss(
            prediction,
            target,
            np.zeros_like(prediction),
            prediction_type="epsilon",
            timesteps=timesteps.numpy(),
            alphas_cumprod=alphas,
            weights=np.full(len(timesteps), 1 / len(timesteps) if loss.reduction == "mean" else 1.0),
            bands=oracle.fft_bands if loss.method == "fft" else oracle.wavelet_bands,
        )
        yield base, low * has_term, high * has_term


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        (ON, {}),
        (dataclasses.replace(ON, timesteps="own", method="fft", min_timestep=0, max_timestep=1000), {}),
        (dataclasses.replace(ON, reduction="mean"), {"gradient_accumulation_steps": 2, "min_snr_gamma": 1.0}),
        (dataclasses.replace(ON, timesteps="shared"), {"max_train_steps": 8}),
        (OFF, {}),
    ],
    ids=["unified", "own", "accumulation and min-SNR", "shared", "off"],
)
def test_the_losses_are_the_formula(make_settings, monkeypatch, loss, changes):
    """Base, low and high are recomputed in float64 from the predictions and targets of a run."""
    passes = record_passes(monkeypatch)
    run_settings = make_settings(**changes)
    outcome = run.train(run_settings, loss)
    alphas = outcome.model.scheduler.alphas_cumprod.double().numpy()
    expected = list(expected_losses(passes, loss, run_settings.min_snr_gamma, alphas))
    per_step = run_settings.gradient_accumulation_steps
    for step, numbers in enumerate(outcome.history):
        base, low, high = np.mean(expected[step * per_step : (step + 1) * per_step], axis=0)
        assert (numbers.base, numbers.low, numbers.high) == pytest.approx((base, low, high), rel=1e-4, abs=1e-9)
        total = loss.dist_match * (0.7 * low + 0.3 * high)
        assert numbers.total == pytest.approx(total, rel=1e-4, abs=1e-9)
    if loss.timesteps == "shared":
        assert {numbers.total > 0 for numbers in outcome.history} == {True, False}


@pytest.mark.parametrize("timesteps", ["own", "unified"])
def test_the_gradient_norm_ratio_and_the_cosine(make_settings, monkeypatch, timesteps):
    """The weight of the first step, recomputed from the recorded predictions."""
    from freq_loss_plugin import frequency_matching_loss

    passes, predict = [], model.Model.predict

    def recording(self, latents, at, *others):
        results = predict(self, latents, at, *others)
        passes.append((at.clone(), *(tensor.detach() for tensor in results)))
        return results

    monkeypatch.setattr(model.Model, "predict", recording)
    loss = dataclasses.replace(
        ON, timesteps=timesteps, min_timestep=0, max_timestep=1000, gradient_ratio=0.2, grad_cosine=True
    )
    outcome = run.train(make_settings(max_train_steps=1), loss)
    # In the first batch, the MSE of the extra pass stands in for the base loss, whose pass comes after it.
    at, prediction, target = passes[0]
    residual = (prediction - target).float()
    base = 2 * residual / residual.numel()
    prediction.requires_grad_()
    term = frequency_matching_loss(
        prediction,
        target,
        prediction_type="epsilon",
        timesteps=at,
        alphas_cumprod=outcome.model.scheduler.alphas_cumprod,
        config=dataclasses.replace(loss, dist_match=1.0, timesteps="unified"),
    )
    (gradient,) = torch.autograd.grad(term.total, prediction)
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), base.flatten(), dim=0)
    (numbers,) = outcome.history
    assert numbers.others["freq_weight"] == pytest.approx((0.2 * base.norm() / gradient.norm()).item(), rel=1e-3)
    assert numbers.others["freq_grad_cosine"] == pytest.approx(cosine.item(), rel=1e-3)
    weighted = numbers.others["freq_weight"] * (0.7 * numbers.low + 0.3 * numbers.high)
    assert numbers.total == pytest.approx(weighted, rel=1e-4)


def test_the_loss_changes_the_weights_but_not_the_base_pass(make_settings):
    plain = run.train(make_settings(output_name="plain", max_train_steps=1), OFF)
    ours = run.train(make_settings(output_name="ours", max_train_steps=1), ON)
    assert plain.history[0].base == ours.history[0].base  # same weights, noise_images, noise and timesteps
    a, b = load_lora(plain.lora), load_lora(ours.lora)
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_gradients_of_two_backward_passes_are_those_of_the_sum(make_settings):
    """The extra pass is propagated by itself, so that only one graph is alive at a time."""
    run_settings = make_settings(network_train_unet_only=True)
    accelerator = run.make_accelerator(run_settings)
    data = dataset.find(run_settings)

    def gradients(summed):
        one_run = trainer.Trainer(run_settings, ON, data, model.load(run_settings, accelerator.device), accelerator)
        one_run.encode()
        losses = []
        backward = one_run.backward
        one_run.backward = losses.append if summed else backward
        one_run.add_gradient(0)
        if summed:
            backward(sum(losses))
        return [parameter.grad.clone() for parameter in one_run.parameters if parameter.grad is not None]

    for separate, of_sum in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(separate, of_sum, rtol=1e-4, atol=1e-7)


@pytest.mark.versions
def test_bf16_gradient_checkpointing_and_logs(make_settings, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_settings = make_settings(
        mixed_precision="bf16", gradient_checkpointing=True, logging_dir=str(tmp_path / "logs"), save_precision="bf16"
    )
    outcome = run.train(run_settings, ON)
    assert {tensor.dtype for tensor in load_lora(outcome.lora).values()} == {torch.bfloat16}
    accumulator = EventAccumulator(str(next((tmp_path / "logs" / "lora").iterdir())))
    accumulator.Reload()
    for name, values in (("loss/freq_low", "low"), ("loss/freq_fraction", "fraction")):
        logged = [event.value for event in accumulator.Scalars(name)]
        assert logged == pytest.approx([getattr(numbers, values) for numbers in outcome.history], rel=1e-5)


@pytest.mark.parametrize("balance", ["timestep", "band"])
def test_the_balance_weighs_the_base_loss(make_settings, monkeypatch, balance):
    """The losses of a run, recomputed from its passes by a `LossBalance` of its own; and the run resumes as it was."""
    from freq_loss_plugin.training.loss_balance import LossBalance
    from freq_loss_plugin.training.passes import Pass

    passes = record_passes(monkeypatch)
    loss = dataclasses.replace(OFF, balance=balance)
    run_settings = make_settings(max_train_steps=4, save_every_n_steps=2)
    outcome = run.train(run_settings, loss)
    independent = LossBalance(loss)
    for (timesteps, prediction, target), numbers in zip(passes, outcome.history, strict=True):
        sample = Pass(torch.from_numpy(prediction).float(), torch.from_numpy(target).float(), timesteps)
        weighed = independent.balance(sample)
        losses = (weighed.prediction - sample.target).square().mean(dim=(1, 2, 3))
        losses = losses if weighed.weights is None else losses * weighed.weights
        assert numbers.base == pytest.approx(losses.mean().item(), rel=1e-4)
        assert numbers.others["balance_unweighted"] == pytest.approx(((prediction - target) ** 2).mean(), rel=1e-4)
        assert numbers.total == 0
    plain = run.train(make_settings(max_train_steps=4, output_name="plain"), OFF)
    whole, off = load_lora(outcome.lora), load_lora(plain.lora)
    assert any(not torch.equal(whole[name], off[name]) for name in whole)
    stopped = run.train(make_settings(max_train_steps=2, output_name="resumed"), loss)
    assert stopped.finished
    resumed = run.train(make_settings(max_train_steps=4, output_name="resumed"), loss, resume=True)
    assert all(torch.equal(tensor, load_lora(resumed.lora)[name]) for name, tensor in whole.items())
