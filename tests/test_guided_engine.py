"""The guidance token in the engine: right features in every pass, what the file says, and a LoRA that follows them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from freq_loss_plugin import ConfigError, FreqLossConfig, guidance
from freq_loss_plugin.__main__ import main
from freq_loss_plugin.embedded import model_folder
from freq_loss_plugin.engine import comparison, model, settings, training

pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parent.parent
GUIDED = FreqLossConfig(guidance_token=8.0, dist_match=0.05)
WIDTH = 64  # of the embedded text encoder


def recognisable(picture):
    """Features that no other picture has."""
    generator = torch.Generator().manual_seed(sum(map(ord, f"{picture.parent.name}/{picture.name}")))
    return torch.randn(WIDTH, generator=generator)


def give_features(picture, features, clip="test@1"):
    tensors, metadata = guidance.contents(picture, features, clip)
    save_file(tensors, guidance.feature_file(picture), metadata)


@pytest.fixture
def made(tmp_path):
    """Settings for three pictures with one caption, one of them twice per epoch; each with features of its own."""
    generator = np.random.default_rng(0)
    for folder, names in (("1_some", "ab"), ("2_more", "c")):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for name in names:
            picture = tmp_path / "data" / folder / f"{name}.png"
            Image.fromarray(generator.integers(0, 256, size=(64, 64, 3), dtype=np.uint8)).save(picture)
            picture.with_suffix(".txt").write_text("noise")
            give_features(picture, recognisable(picture))
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


def pictures_of(made):
    return sorted(Path(made.train_data_dir).rglob("*.png"))


def test_both_passes_see_the_features_of_their_pictures(made, monkeypatch):
    told, latents_of = [], {}
    encode, unet_of = model.Model.encode, model.load

    def remembering(self, examples, *others):
        found = encode(self, examples, *others)
        latents_of.update({example.file: latent for example, latent in zip(examples, found, strict=True)})
        return found

    def watched(*arguments):
        loaded = unet_of(*arguments)
        predict = loaded.predict

        def recording(latents, timesteps, noise, captions, features):
            told.append([latents])
            return predict(latents, timesteps, noise, captions, features)

        loaded.predict = recording
        loaded.pipeline.unet.register_forward_pre_hook(lambda _, arguments: told[-1].append(arguments[2]))
        return loaded

    monkeypatch.setattr(model.Model, "encode", remembering)
    monkeypatch.setattr(training, "load", watched)
    outcome = training.train(made, GUIDED)
    plain = outcome.model.text_states(["noise"])
    assert len(told) == 2 * made.max_train_steps
    for latents, states in told:
        for latent, row in zip(latents, states, strict=True):
            (picture,) = (file for file, known in latents_of.items() if torch.equal(known, latent))
            assert torch.equal(row[-1], recognisable(picture))
            # The text encoder learns a little in four steps; everything else of its output is still there.
            assert (row[:-1] - plain[0, :-1]).norm() < 0.1 * plain[0, :-1].norm()


def test_the_file_carries_the_mean_and_the_clip(made):
    outcome = training.train(made, GUIDED)
    with safe_open(str(outcome.lora), "pt") as opened:
        texts = opened.metadata()
    expected = sum(recognisable(p) * (2 if p.name == "c.png" else 1) for p in pictures_of(made)) / 4
    torch.testing.assert_close(guidance.stored_mean(texts), expected)
    assert (texts[guidance.KEY], texts[guidance.CLIP_KEY]) == ("8.0", "test@1")
    torch.testing.assert_close(outcome.features.mean, expected)


def test_samples_get_the_features_in_the_half_with_the_prompt(made):
    fresh = model.load(made, torch.device("cpu"))
    seen = []
    fresh.pipeline.unet.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["encoder_hidden_states"]), with_kwargs=True
    )
    features = torch.randn(1, WIDTH)
    comparison.sample(fresh, comparison.Sampling(["noise", "a b"], steps=2, features=features), (64, 64))
    expected = torch.cat([fresh.text_states(["", ""]), fresh.text_states(["noise", "a b"], features)])
    for states in seen:
        torch.testing.assert_close(states, expected)
    assert not torch.allclose(expected[0, -1], features[0])


def test_a_guided_training_resumes_with_the_same_clip_only(made):
    training.train(made, GUIDED)
    for picture in pictures_of(made):
        give_features(picture, recognisable(picture), clip="other@2")
    with pytest.raises(ConfigError, match="guidance_clip = test@1, and this training has other@2"):
        training.train(made, GUIDED, resume=True)


def test_missing_features_are_told_with_the_command_that_makes_them(made):
    guidance.feature_file(pictures_of(made)[0]).unlink()
    with pytest.raises(guidance.FeatureError) as caught:
        training.train(made, GUIDED)
    words = str(caught.value)
    assert "1 of 3 pictures have no features yet" in words
    command = words.strip().splitlines()[-1].split("-m freq_loss_plugin ")[1]
    assert command.endswith(f"--clip {model_folder() / 'image_encoder'}")
    # It names the picture again as a broken one would be, so that is all that is missing.
    assert main(command.split()) == 0
    assert all(guidance.feature_file(picture).is_file() for picture in pictures_of(made))


def test_features_of_another_width_are_refused(made):
    for picture in pictures_of(made):
        give_features(picture, torch.randn(WIDTH + 1))
    with pytest.raises(guidance.FeatureError, match=f"{WIDTH + 1} wide, and the text encoder of this model {WIDTH}"):
        training.train(made, GUIDED)


def test_the_embedded_default_with_a_guidance_token(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--guidance_token", "true", "--max_train_steps", "1"]) == 0
    assert "guidance_token = 1: on" in capsys.readouterr().out
    (plain,) = Path("output").glob("tiny_lora-plain_mse.safetensors")
    with safe_open(str(plain), "pt") as opened:
        assert guidance.stored_mean(opened.metadata()).shape == (WIDTH,)
    # The TOML it leaves goes on with the features that are there.
    assert main(["train", "--config", "output/config.toml", "--output_name", "again"]) == 0


def test_a_lora_follows_the_token(tmp_path, monkeypatch):
    """Two groups of pictures that look different, under one caption: the features decide which is drawn."""
    spec = importlib.util.spec_from_file_location("guidance_token", ROOT / "benchmarks" / "guidance_token.py")
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "guidance_token", benchmark)  # dataclasses look their module up
    spec.loader.exec_module(benchmark)
    found = benchmark.run(tmp_path, 160)
    for one, other in (("A", "B"), ("B", "A")):
        assert found[one].distance[one] < 0.85 * found[one].distance[other]
        assert found[one].agreement[one] > found[one].agreement[other] + 0.15
