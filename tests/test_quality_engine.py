"""Image quality in the engine: from the command line to the timesteps of single images."""

from __future__ import annotations

from dataclasses import replace

import bad_images
import pytest
import toml
import torch
from bad_images import enlarged, scene
from engine_runs import load_lora, metadata_of

from freq_loss_plugin import ConfigError, FreqLossConfig
from freq_loss_plugin.__main__ import main
from freq_loss_plugin.engine import dataset, model, run, settings
from freq_loss_plugin.engine.quality import survey_images
from freq_loss_plugin.engine.trainer import Trainer
from freq_loss_plugin.toy_model import model_folder

AUTO = {"dist_match": 0.0, "image_quality": "auto"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of sharp images, and one in which others are enlarged eightfold and train twice per epoch."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("sharp", "mixed"):
        bad_images.write(folder / name / "1_sharp", [scene(number) for number in range(3)])
    bad_images.write(folder / "mixed" / "2_bad", [enlarged(scene(number), 8) for number in range(10, 13)])
    bad_images.write(folder / "bad" / "1_bad", [enlarged(scene(number), 8) for number in range(10, 13)])
    return folder


def values_of(images, output, **values):
    return {
        "pretrained_model_name_or_path": str(model_folder()),
        "train_data_dir": str(images),
        "resolution": "128",
        "caption_extension": ".txt",
        "output_dir": str(output),
        "train_batch_size": 3,
        "max_train_steps": 3,
        "seed": 5,
        **values,
    }


def make_trainer(images, output, loss, **values):
    made, _ = settings.read(values_of(images, output, **values))
    accelerator = run.make_accelerator(made)
    data, loaded = dataset.find(made), model.load(made, accelerator.device)
    survey = survey_images(made, loss, data, loaded)
    trainer = Trainer(made, loss, replace(data, survey=survey), loaded, accelerator)
    trainer.encode()
    return trainer


def recorded(trainer, monkeypatch, batches):
    """The (folder, timestep, is extra) of every sample of these batches, and the noise that each had."""
    samples, noises, predict = [], [], trainer._model.predict

    def recording(latents, timesteps, noise, captions, features=None):
        samples.extend((caption.split()[0], int(t)) for caption, t in zip(captions, timesteps, strict=True))
        noises.append(noise)
        return predict(latents, timesteps, noise, captions, features)

    monkeypatch.setattr(trainer._model, "predict", recording)
    for number in range(batches):
        trainer.add_gradient(number)
        trainer._term.settle(number + 1)
    return samples, noises


OPTIONS = {
    "none": AUTO,
    "own": {**AUTO, "dist_match": 0.05, "timesteps": "own"},
    "shared": {**AUTO, "dist_match": 0.05, "timesteps": "shared", "gradient_ratio": 0.1},
    "unified": {**AUTO, "dist_match": 0.05, "timesteps": "unified"},
    "balanced": {**AUTO, "balance": "band"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bad_images_train_from_their_least_timestep_on(images, tmp_path, monkeypatch, options):
    trainer = make_trainer(images / "mixed", tmp_path, FreqLossConfig(**options))
    assert len(trainer._data.survey.least) == 3
    least = min(trainer._data.survey.least.values())
    assert 450 < least < 680
    samples, _ = recorded(trainer, monkeypatch, 10)
    extra = {"unified"} & {options.get("timesteps")} and options["dist_match"] > 0
    if not extra:  # whose bad samples are there, and weigh nothing
        assert min(timestep for name, timestep in samples if name == "2_bad") >= least
    assert min(timestep for name, timestep in samples if name == "1_sharp") < 400


def test_latents_of_bad_images_are_restored_and_others_stay(images, tmp_path):
    plain = make_trainer(images / "mixed", tmp_path, FreqLossConfig(dist_match=0.0))
    trainer = make_trainer(images / "mixed", tmp_path, FreqLossConfig(**AUTO))
    filters = {image.file: one for image, one in trainer._data.survey.restorations.items()}
    assert {file.parent.name for file in filters} == {"2_bad"}
    for example, before, after in zip(plain._data.examples, plain._latents, trainer._latents, strict=True):
        filtered = filters.get(example.file)
        assert torch.equal(after, before if filtered is None else filtered.apply(before))
        assert filtered is None or not torch.equal(after, before)


def test_timesteps_and_noise_of_sharp_images_are_what_they_were(images, tmp_path, monkeypatch):
    found = [
        recorded(make_trainer(images / "mixed", tmp_path, FreqLossConfig(**options)), monkeypatch, 6)
        for options in (AUTO, {"dist_match": 0.0, "image_rules": {"2_bad": {"least_timestep": 1}}})
    ]
    assert all(map(torch.equal, found[0][1], found[1][1]))
    changed = [(one, other) for one, other in zip(found[0][0], found[1][0], strict=True) if one != other]
    assert changed
    assert all((one[0] == "2_bad" and one[1] >= 560 > other[1]) or other[1] < one[1] for one, other in changed)


def train(images, output, *arguments, **values):
    output.mkdir(exist_ok=True)
    file = output / "config.toml"
    lines = [f"{key} = {value!r}".replace("'", '"') for key, value in values_of(images, output, **values).items()]
    file.write_text("\n".join(lines), encoding="utf-8")
    return main(["train", "--config", str(file), *arguments])


def test_a_set_of_sharp_images_trains_bit_identically(images, tmp_path, capsys):
    assert train(images / "sharp", tmp_path / "plain", "--dist_match", "0") == 0
    assert train(images / "sharp", tmp_path / "auto", "--dist_match", "0", "--freq_loss_image_quality", "auto") == 0
    assert "3 images: 3 full quality; this costs milliseconds per batch" in capsys.readouterr().out
    plain, auto = (load_lora(tmp_path / name / "last.safetensors") for name in ("plain", "auto"))
    assert all(torch.equal(auto[name], plain[name]) for name in plain)


def test_a_resumed_run_is_the_uninterrupted_one(images, tmp_path):
    options = ("--dist_match", "0", "--freq_loss_image_quality", "auto")
    assert train(images / "mixed", tmp_path / "whole", *options, max_train_steps=4) == 0
    assert train(images / "mixed", tmp_path / "parts", *options, max_train_steps=2) == 0
    assert train(images / "mixed", tmp_path / "parts", *options, "--resume", max_train_steps=4) == 0
    whole, parts = (load_lora(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    metadata = metadata_of(tmp_path / "whole" / "last.safetensors")
    assert metadata["ss_freq_loss_image_quality"] == "auto"
    assert metadata["ss_freq_loss_image_quality_summary"].startswith("6 images: 3 full quality; ")


def test_a_rule_in_the_toml(images, tmp_path, capsys):
    file = tmp_path / "config.toml"
    rules = '\n[freq_loss]\ndist_match = 0\n[freq_loss.image_quality]\n"2_bad" = { least_timestep = 650 }\n'
    lines = [f"{key} = {value!r}".replace("'", '"') for key, value in values_of(images / "mixed", tmp_path).items()]
    file.write_text("\n".join(lines) + rules, encoding="utf-8")
    assert main(["train", "--config", str(file)]) == 0
    out = capsys.readouterr().out
    assert "3 by your own rule, train at t >= 650" in out
    assert "image_quality = {'2_bad': {'least_timestep': 650}}" in out
    read, loss = settings.read_file(file, {})
    again, loss_again = settings.read(toml.loads(settings.as_toml(read, loss)))
    assert (again, loss_again) == (read, loss)


def test_what_cannot_be_used_is_said_before_training(images, tmp_path, capsys):
    assert train(images / "bad", tmp_path, "--freq_loss_image_quality", "auto") == 1
    assert "none of the 3 images is sharp" in capsys.readouterr().err
    file = tmp_path / "config.toml"
    with file.open("a", encoding="utf-8") as config:
        config.write('\nmax_timestep = 500\n[freq_loss.image_quality]\n"1_bad" = { least_timestep = 650 }\n')
    assert main(["train", "--config", str(file)]) == 1
    assert "may only train above every timestep of this run (max_timestep = 500)" in capsys.readouterr().err
    assert not (tmp_path / "last.safetensors").exists()


def test_networks_lora_refuses_it(images, tmp_path):
    with pytest.raises(ConfigError, match="trains without the plug-in"):
        settings.read(
            values_of(images / "sharp", tmp_path, network_module="networks.lora", freq_loss_image_quality="auto")
        )
