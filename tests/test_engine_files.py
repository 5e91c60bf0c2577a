"""What the engine writes: LoRA files that others read, logs, and states from which a run resumes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from engine_runs import OFF, ON, load_lora, metadata_of

from freq_loss_plugin import ConfigError
from freq_loss_plugin.engine import comparison, dataset, model, run, trainer
from freq_loss_plugin.toy_model import model_folder

# Warnings of diffusers, transformers and accelerate are not ours.
pytestmark = pytest.mark.filterwarnings("default")


def test_the_file_is_a_kohya_lora_with_the_metadata_of_the_hook(make_settings, tmp_path):
    outcome = run.train(make_settings(network_dim=3, network_alpha=6.0), ON)
    weights, metadata = load_lora(outcome.lora), metadata_of(outcome.lora)
    names = {name.rsplit(".lora_", 1)[0] for name in weights if ".lora_" in name}
    unet = [name for name in names if name.startswith("lora_unet_")]
    assert (len(unet), len(names)) == (192, 192 + 2 * 6)
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0" in names
    assert "lora_te_text_model_encoder_layers_1_mlp_fc2" in names
    for name in names:
        assert weights[f"{name}.alpha"] == 6
        assert weights[f"{name}.lora_down.weight"].shape[0] == weights[f"{name}.lora_up.weight"].shape[1] == 3
    for key, value in ON.file_metadata("networks.lora").items():
        assert metadata[key] == value
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_steps"], metadata["ss_base_model_version"]) == ("3", "4", "sd_v1")
    (tmp_path / "any").touch()
    assert oct(outcome.lora.stat().st_mode) == oct((tmp_path / "any").stat().st_mode)


def test_without_the_loss_the_metadata_do_not_mention_it(make_settings):
    metadata = metadata_of(run.train(make_settings(max_train_steps=1), OFF).lora)
    assert not [key for key in metadata if key.startswith("ss_freq_loss")]


@pytest.mark.versions
def test_diffusers_loads_the_file_and_samples_the_same_images(make_settings):
    from diffusers import StableDiffusionPipeline

    outcome = run.train(make_settings(learning_rate=1e-2, network_alpha=4.0), ON)
    sampling = comparison.Sampling(["noise, number 1", "noise, number 2"], steps=4, guidance=3.0)
    trained = comparison.sample(outcome.model, sampling, (64, 64))
    fresh = model.load(make_settings(), torch.device("cpu"))
    before = comparison.sample(fresh, sampling, (64, 64))
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder(), safety_checker=None).to(dtype=torch.float32)
    pipeline.load_lora_weights(str(outcome.lora))
    loaded = comparison.sample(dataclasses.replace(fresh, pipeline=pipeline, adapted={}), sampling, (64, 64))
    assert (trained - before).abs().max() > 1e-2
    torch.testing.assert_close(loaded, trained, atol=2e-5, rtol=0)


def test_a_validation_split_is_not_trained_on_and_its_bands_are_logged(make_settings, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_settings = make_settings(
        validation_split=0.34, validate_every_n_steps=1, max_train_steps=2, logging_dir=str(tmp_path / "logs")
    )
    data = dataset.find(run_settings)
    kept, held_out = dataset.split(data, run_settings.validation_split, run_settings.seed)
    assert len(held_out) == round(0.34 * len(data.examples)) > 0
    trained, validated = ({example.file for example in part} for part in (kept.examples, held_out))
    assert not trained & validated
    assert trained | validated == {example.file for example in data.examples}
    outcome = run.train(run_settings, dataclasses.replace(ON, validation=True))
    assert f"{len(kept.examples)} images" in capsys.readouterr().out
    assert [evaluation.step for evaluation in outcome.evaluations] == [0, 1, 2]
    (folder,) = (tmp_path / "logs" / "lora").iterdir()  # one for each run
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    for band in ("low", "high"):
        events = accumulator.Scalars(f"loss/validation/freq_{band}")
        assert [event.value for event in events] == pytest.approx(
            [getattr(evaluation, band) for evaluation in outcome.evaluations], rel=1e-4
        )
    assert len(accumulator.Images("loss/validation/freq_spectrum")) == 3
    assert len(accumulator.Scalars("loss/validation/step_average")) == 3
    run.train(make_settings(max_train_steps=1), dataclasses.replace(ON, validation=True))
    output = capsys.readouterr().out
    assert "set validation_split" in output
    assert "set logging_dir" in output
    with pytest.raises(ConfigError, match="leaves none to train on"):
        dataset.split(data, 0.99, 0)


@pytest.mark.versions
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(make_settings):
    changes = {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 1}
    loss = dataclasses.replace(ON, balance="timestep", gradient_ratio=0.1)
    whole = run.train(make_settings(output_name="whole", **changes), loss)
    interrupted = make_settings(output_name="parts", save_every_n_steps=3, **changes)

    class KilledError(Exception):
        pass

    save = trainer.Trainer._save

    def die_after_saving(self, file):
        save(self, file)
        raise KilledError

    trainer.Trainer._save = die_after_saving
    try:
        with pytest.raises(KilledError):
            run.train(interrupted, loss)
    finally:
        trainer.Trainer._save = save
    resumed = run.train(interrupted, loss, resume=True)
    assert len(resumed.history) == 1
    assert resumed.history[0]._replace(message=None) == whole.history[3]._replace(message=None)
    torch.testing.assert_close(load_lora(resumed.lora), load_lora(whole.lora), rtol=0, atol=0)


def test_resuming_with_other_settings_or_without_a_state_is_refused(make_settings):
    with pytest.raises(ConfigError, match=r"no saved state .*lora\.state.*save_every_n_steps"):
        run.train(make_settings(), ON, resume=True)
    run.train(make_settings(max_train_steps=1), ON)
    with pytest.raises(ConfigError, match=r"saved with network_dim = 4, and this run has 8"):
        run.train(make_settings(network_dim=8), ON, resume=True)
    with pytest.raises(ConfigError, match=r"saved with freq_loss_dist_match = 0\.05, and this run has 0\.5"):
        run.train(make_settings(), dataclasses.replace(ON, dist_match=0.5), resume=True)
    longer = run.train(make_settings(max_train_steps=2), ON, resume=True)
    assert longer.step == 2
    make_settings().state_file.write_bytes(b"half a file")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        run.train(make_settings(), ON, resume=True)
