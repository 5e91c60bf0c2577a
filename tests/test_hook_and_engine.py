"""The same passes through the hook in sd-scripts and through the engine: every logged number is the same."""

from __future__ import annotations

import pytest
import torch
from hooked import install

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.engine import dataset, demo, model, run, settings
from freq_loss_plugin.engine.trainer import Trainer
from freq_loss_plugin.training.passes import Pass

BATCHES, SEED = 6, 11

pytestmark = [pytest.mark.sd_scripts, pytest.mark.filterwarnings("default")]


@pytest.fixture
def make_trainer(tmp_path):
    """The engine's trainer on its embedded model, three images per batch."""
    prepared = demo.prepare(tmp_path, "weave")

    def make(loss):
        made, _ = settings.read({**prepared.values, "train_batch_size": 3, "seed": SEED, "max_train_steps": BATCHES})
        accelerator = run.make_accelerator(made)
        trainer = Trainer(made, loss, dataset.find(made), model.load(made, accelerator.device), accelerator)
        trainer.encode()
        return trainer

    return make


def in_hook(stand_in, loss):
    """The numbers of each step, and the passes of each batch in the order in which they ran."""
    hook = install(stand_in, loss)
    numbers, passes = [], []
    for batch in range(BATCHES):
        stand_in.accelerator.backward(stand_in.process_batch(seed=batch))
        passes.append(list(stand_in.passes))
        stand_in.trainer.all_reduce_network(stand_in.accelerator, stand_in.denoiser)
        numbers.append(stand_in.trainer.generate_step_logs(*log_arguments(stand_in)))
    assert hook.step == BATCHES
    return numbers, passes


def log_arguments(stand_in):
    """Those of ``generate_step_logs`` up to its first default: args, current_loss, avr_loss, lr_scheduler, ..."""
    schedule = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(stand_in.denoiser.parameters(), lr=0.1))
    return stand_in.args, 0.0, 0.0, schedule, ["unet"]


def in_engine(trainer, passes, monkeypatch):
    """The numbers of each step, with these passes in place of the model's."""
    alphas_cumprod, numbers, timesteps = trainer._alphas_cumprod, [], []
    waiting = [recorded for batch in passes for recorded in batch]

    def replay(latents, drawn, examples, generator):
        prediction, target, recorded = waiting.pop(0)
        timesteps.append((drawn.tolist(), recorded.tolist()))
        return Pass(prediction.clone().requires_grad_(), target, recorded, alphas_cumprod)

    monkeypatch.setattr(trainer, "_pass", replay)
    for batch in range(BATCHES):
        trainer.add_gradient(batch)
        numbers.append(trainer._term.settle(batch + 1).logs())
    assert not waiting
    return numbers, timesteps


@pytest.mark.parametrize(
    "options",
    [
        {"timesteps": "own", "min_timestep": 0, "max_timestep": 1000},
        {"timesteps": "own", "gradient_ratio": 0.1, "grad_cosine": True},
        {"timesteps": "shared", "gradient_ratio": 0.1, "grad_cosine": True},
        {"timesteps": "unified"},
        {"timesteps": "unified", "gradient_ratio": 0.1, "grad_cosine": True},
        {"timesteps": "unified", "sample_weights": "min_snr", "method": "fft", "reduction": "mean"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_hook_and_engine_log_the_same_numbers(stand_ins, make_trainer, monkeypatch, options):
    loss = FreqLossConfig(dist_match=0.05, **options)
    of_hook, passes = in_hook(stand_ins.make("sd15", seed=SEED, max_train_steps=BATCHES), loss)
    of_engine, timesteps = in_engine(make_trainer(loss), passes, monkeypatch)
    for expected, logged in zip(of_hook, of_engine, strict=True):
        of_loss = {name: value for name, value in expected.items() if name.startswith("loss/freq_")}
        assert logged == pytest.approx(of_loss, rel=1e-5)
    assert any(logged["loss/freq_total"] > 0 for logged in of_engine)
    if loss.gradient_ratio:
        assert of_engine[0]["loss/freq_total"] == 0 or of_engine[0]["loss/freq_weight"] != pytest.approx(0.05)
    # Both choose the same timesteps for extra passes and for batches that share one.
    chosen = {"own": [], "unified": timesteps[::2], "shared": [pair for pair in timesteps if len(set(pair[1])) == 1]}
    assert all(drawn == recorded for drawn, recorded in chosen[loss.timesteps])
    assert chosen[loss.timesteps] or loss.timesteps == "own"
