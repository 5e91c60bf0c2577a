"""The guidance token in the engine: the features in every pass, the metadata of the LoRA, and its effect."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_runs import quick_demo
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from freq_loss_plugin import ConfigError, FreqLossConfig
from freq_loss_plugin.__main__ import main
from freq_loss_plugin.engine import comparison, model, run, settings
from freq_loss_plugin.guidance_token import features as guidance
from freq_loss_plugin.toy_model import model_folder

pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parent.parent
GUIDED = FreqLossConfig(guidance_token=8.0, dist_match=0.05)
WIDTH = 64  # of the toy model's text encoder


def unique_features(image):
    """Features that no other image has."""
    generator = torch.Generator().manual_seed(sum(map(ord, f"{image.parent.name}/{image.name}")))
    return torch.randn(WIDTH, generator=generator)


def write_features(image, features, clip="test@1"):
    tensors, metadata = guidance.contents(image, features, clip)
    save_file(tensors, guidance.feature_file(image), metadata)


@pytest.fixture
def run_settings(tmp_path):
    """Settings for three images with one caption, one of them twice per epoch; each with features of its own."""
    generator = np.random.default_rng(0)
    for folder, names in (("1_some", "ab"), ("2_more", "c")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for name in names:
            image = tmp_path / "data" / folder / f"{name}.png"
            Image.fromarray(generator.integers(0, 256, size=(64, 64, 3), dtype=np.uint8)).save(image)
            image.with_suffix(".txt").write_text("noise")
            write_features(image, unique_features(image))
    return settings.Settings(
        pretrained_model_name_or_path=str(model_folder()),
        train_data_dir=str(tmp_path / "data"),
        caption_extension=".txt",
        resolution="64",
        train_batch_size=2,
        max_train_steps=4,
        learning_rate=1e-3,
        output_dir=str(tmp_path / "output"),
        output_name="lora",
    )


def images_of(run_settings):
    return sorted(Path(run_settings.train_data_dir).rglob("*.png"))


def test_both_passes_get_the_features_of_their_images(run_settings, monkeypatch):
    passes, latents_of = [], {}
    encode, load = model.Model.encode, model.load

    def recording_encode(self, examples, *others):
        latents = encode(self, examples, *others)
        latents_of.update({example.file: latent for example, latent in zip(examples, latents, strict=True)})
        return latents

    def recording_load(*arguments):
        loaded = load(*arguments)
        predict = loaded.predict

        def recording_predict(latents, timesteps, noise, captions, features):
            passes.append([latents])
            return predict(latents, timesteps, noise, captions, features)

        loaded.predict = recording_predict
        loaded.pipeline.unet.register_forward_pre_hook(lambda _, arguments: passes[-1].append(arguments[2]))
        return loaded

    monkeypatch.setattr(model.Model, "encode", recording_encode)
    monkeypatch.setattr(run, "load", recording_load)
    outcome = run.train(run_settings, GUIDED)
    plain = outcome.model.text_states(["noise"])
    assert len(passes) == 2 * run_settings.max_train_steps
    for latents, states in passes:
        for latent, row in zip(latents, states, strict=True):
            (image,) = (file for file, known in latents_of.items() if torch.equal(known, latent))
            assert torch.equal(row[-1], unique_features(image))
            # Training changes the text encoder a little in four steps; the other tokens are still its output.
            assert (row[:-1] - plain[0, :-1]).norm() < 0.1 * plain[0, :-1].norm()


def test_the_file_contains_the_mean_and_the_clip(run_settings):
    outcome = run.train(run_settings, GUIDED)
    with safe_open(str(outcome.lora), "pt") as opened:
        metadata = opened.metadata()
    expected = sum(unique_features(p) * (2 if p.name == "c.png" else 1) for p in images_of(run_settings)) / 4
    torch.testing.assert_close(guidance.stored_mean(metadata), expected)
    assert (metadata[guidance.KEY], metadata[guidance.CLIP_KEY]) == ("8.0", "test@1")
    torch.testing.assert_close(outcome.features.mean, expected)


def test_samples_get_the_features_in_the_conditional_half(run_settings):
    loaded = model.load(run_settings, torch.device("cpu"))
    hidden_states = []
    loaded.pipeline.unet.register_forward_pre_hook(
        lambda _, __, named: hidden_states.append(named["encoder_hidden_states"]), with_kwargs=True
    )
    features = torch.randn(1, WIDTH)
    comparison.sample(loaded, comparison.Sampling(["noise", "a b"], steps=2, features=features), (64, 64))
    expected = torch.cat([loaded.text_states(["", ""]), loaded.text_states(["noise", "a b"], features)])
    for states in hidden_states:
        torch.testing.assert_close(states, expected)
    assert not torch.allclose(expected[0, -1], features[0])


def test_a_run_resumes_with_the_same_clip_only(run_settings):
    run.train(run_settings, GUIDED)
    for image in images_of(run_settings):
        write_features(image, unique_features(image), clip="other@2")
    with pytest.raises(ConfigError, match="guidance_clip = test@1, and this run has other@2"):
        run.train(run_settings, GUIDED, resume=True)


def test_missing_features_are_listed_with_the_command_that_computes_them(run_settings):
    guidance.feature_file(images_of(run_settings)[0]).unlink()
    with pytest.raises(guidance.FeatureError) as caught:
        run.train(run_settings, GUIDED)
    message = str(caught.value)
    assert "1 of 3 images have no features yet" in message
    command = message.strip().splitlines()[-1].split("-m freq_loss_plugin ")[1]
    assert command.endswith(f"--clip {model_folder() / 'image_encoder'}")
    assert main(command.split()) == 0
    assert all(guidance.feature_file(image).is_file() for image in images_of(run_settings))


def test_features_of_another_width_are_refused(run_settings):
    for image in images_of(run_settings):
        write_features(image, torch.randn(WIDTH + 1))
    with pytest.raises(guidance.FeatureError, match=f"{WIDTH + 1} wide, and the text encoder of this model {WIDTH}"):
        run.train(run_settings, GUIDED)


def test_the_demo_with_a_guidance_token(tmp_path, monkeypatch, capsys):
    quick_demo(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--guidance_token", "true", "--max_train_steps", "1"]) == 0
    assert "guidance_token = 1: on" in capsys.readouterr().out
    (plain,) = Path("output").glob("tiny_lora-plain_mse.safetensors")
    with safe_open(str(plain), "pt") as opened:
        assert guidance.stored_mean(opened.metadata()).shape == (WIDTH,)
    # Training with the TOML that it wrote uses the same features.
    assert main(["train", "--config", "output/config.toml", "--output_name", "again"]) == 0


def test_a_lora_follows_the_token(tmp_path, monkeypatch):
    """Two groups of different images with the same caption: the features decide which is sampled."""
    spec = importlib.util.spec_from_file_location("guidance_token", ROOT / "benchmarks" / "guidance_token.py")
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "guidance_token", benchmark)  # dataclasses look their module up
    spec.loader.exec_module(benchmark)
    groups = benchmark.run(tmp_path, 60)
    for one, other in (("A", "B"), ("B", "A")):
        assert groups[one].distance[one] < 0.95 * groups[other].distance[one]
        assert groups[one].agreement[one] > groups[one].agreement[other] + 0.25
