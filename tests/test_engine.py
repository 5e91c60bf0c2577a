"""The engine, on the embedded model: what it trains, what it writes, and what becomes of it when things go wrong."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import oracle
import pytest
import toml
import torch
from PIL import Image

from freq_loss_plugin import ConfigError, FreqLossConfig
from freq_loss_plugin.__main__ import main
from freq_loss_plugin.config import SECTION
from freq_loss_plugin.embedded import model_folder
from freq_loss_plugin.engine import comparison, dataset, lora_file, model, settings, training
from freq_loss_plugin.engine.cli import parse_overrides

# diffusers', transformers' and accelerate's own warnings are theirs.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parent.parent
OFF = FreqLossConfig(dist_match=0)
ON = FreqLossConfig(dist_match=0.05)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six pictures of noise in kohya's layout, one of them twice per epoch."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for name, count in (("1_noise", 5), ("2_more", 1)):
        (folder / name).mkdir()
        for i in range(count):
            pixels = generator.integers(0, 256, size=(64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
            (folder / name / f"{i}.txt").write_text(f"noise, number {i}")
    return folder


@pytest.fixture
def configure(pictures, tmp_path):
    """Small settings with changes; everything is written below the test's own folder."""

    def make(**changes):
        values = {
            "pretrained_model_name_or_path": str(model_folder()),
            "train_data_dir": str(pictures),
            "caption_extension": ".txt",
            "resolution": "64",
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "max_train_steps": 4,
            "output_dir": str(tmp_path / "output"),
            "output_name": "lora",
        }
        return settings.Settings(**(values | changes))

    return make


def write_toml(folder, made, **loss):
    file = folder / "config.toml"
    file.write_text(settings.as_toml(made, FreqLossConfig(**loss)))
    return file


def weights_of(file):
    from safetensors.torch import load_file

    return load_file(file)


def metadata_of(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata()


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# The keys


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network_dims": 8}, ["network_dims: not supported", "Did you mean network_dim?", "sd-scripts"]),
        ({"xformers": True}, ["xformers: not supported", "accelerate launch train_network.py"]),
        ({"network_dim": "8"}, ["network_dim = '8' (str)", "a whole number", "remove the quotes"]),
        ({"network_dim": 0}, ["network_dim = 0", ">= 1"]),
        ({"network_module": "networks.lora", "dist_match": 0, "guidance_token": True}, ["without the plug-in"]),
        ({"optimizer_type": "AdamW8bit"}, ["'AdamW8bit'", "'AdamW'"]),
        ({"mixed_precision": "bf"}, ["'bf'", "did you mean 'bf16'?"]),
        ({"cache_latents": False}, ["cache_latents = False", "one of True"]),
        ({"gradient_checkpointing": "true"}, ["gradient_checkpointing = 'true'", "true or false", "quotes"]),
        ({"resolution": "500"}, ["resolution = '500'", "divisible by 8"]),
        ({"resolution": "512x512"}, ["resolution = '512x512'", "width,height"]),
        ({"min_timestep": 500, "max_timestep": 500}, ["min_timestep = 500", "max_timestep = 500"]),
        ({"learning_rate": 0.0}, ["nothing would be trained"]),
        ({"train_data_dir": "nowhere"}, ["train_data_dir = 'nowhere'", "a folder"]),
        ({"pretrained_model_name_or_path": ""}, ["pretrained_model_name_or_path is missing"]),
        ({"network_args": ["conv_dim=4"]}, ["'conv_dim=4'", "sd-scripts"]),
        ({"freq_loss_network_module": "lycoris.kohya"}, ["'lycoris.kohya'", "sd-scripts"]),
        ({"network_module": "networks.lora", "dist_match": 0.1}, ["without the plug-in", "kohya_patch"]),
        ({"network_module": "networks.lora_flux"}, ["'networks.lora_flux'", "'kohya_patch', 'networks.lora'"]),
        ({"network_args": ["dist_match=much"]}, ["dist_match = 'much'", "a number"]),
        ({"freq_loss_metod": "fft"}, ["freq_loss_metod", "Did you mean freq_loss_method?"]),
    ],
)
def test_keys_that_cannot_be_used_are_named(pictures, changes, words):
    values = {"pretrained_model_name_or_path": "x", "train_data_dir": str(pictures)}
    with pytest.raises(ConfigError) as caught:
        settings.read({"training": values | changes})
    for word in words:
        assert word in str(caught.value)


def test_a_kohya_toml_is_read_as_it_is(pictures):
    """The example for SD1.5 that goes to sd-scripts, with its sections and all."""
    values = toml.load(ROOT / "examples" / "sd15.toml")
    values["data"]["train_data_dir"] = str(pictures)
    made, loss = settings.read(values)
    assert (made.network_dim, made.train_batch_size, made.size) == (4, 4, (512, 512))
    assert made.min_snr_gamma == loss.min_snr_gamma == 5.0
    assert loss == FreqLossConfig()
    again, loss_again = settings.read(toml.loads(settings.as_toml(made, loss)))
    assert (again, loss_again) == (made, loss)


def test_defaults_are_those_of_the_first_description():
    made = settings.Settings.__dataclass_fields__
    assert [made[name].default for name in ("network_dim", "resolution", "train_batch_size")] == [4, "512", 4]


def test_options_on_the_command_line_win(pictures):
    arguments = [
        "--max_train_steps",
        "7",
        "--dist_match=0.01",
        "--network_train_unet_only",
        "--freq_loss_method",
        "fft",
    ]
    overrides = parse_overrides(arguments)
    values = {"pretrained_model_name_or_path": "x", "train_data_dir": str(pictures), "max_train_steps": 3}
    made, loss = settings.read(settings.override({"a": values, SECTION: {"dist_match": 0.5}}, overrides))
    assert (made.max_train_steps, made.network_train_unet_only) == (7, True)
    assert (loss.dist_match, loss.method) == (0.01, "fft")
    with pytest.raises(ConfigError, match=r"max_train_step: not supported.*Did you mean max_train_steps"):
        parse_overrides(["--max_train_step", "7"])


def test_networks_lora_is_plain_training(pictures):
    values = {"pretrained_model_name_or_path": "x", "train_data_dir": str(pictures), "network_module": "networks.lora"}
    assert not settings.read({"training": values})[1].enabled


def test_network_args_win_over_the_section(pictures):
    values = {
        "pretrained_model_name_or_path": "x",
        "train_data_dir": str(pictures),
        "network_args": ["dist_match=0.02"],
    }
    assert settings.read({"training": values})[1].dist_match == 0.02


# The data


def test_pictures_captions_and_repeats(configure, pictures):
    found = dataset.find(configure())
    assert [(example.file.parent.name, example.repeats) for example in found.examples] == [("1_noise", 1)] * 5 + [
        ("2_more", 2)
    ]
    assert found.examples[3].caption == "noise, number 3"
    assert found.warnings == []
    assert found.tag_frequency["1_noise"] == {"noise": 5, **{f"number {i}": 1 for i in range(5)}}


def test_a_missing_caption_is_the_name_of_the_folder_and_told(configure, tmp_path):
    (tmp_path / "1_red cat").mkdir()
    (tmp_path / "notes").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "1_red cat" / "one.png")
    found = dataset.find(configure(train_data_dir=str(tmp_path)))
    assert found.examples[0].caption == "red cat"
    told = " ".join(found.warnings)
    for words in ("1_red cat/one.png", "*.txt", "notes"):
        assert words in told


def test_broken_pictures_are_refused_by_name(configure, tmp_path):
    folder = tmp_path / "1_mixed"
    folder.mkdir()
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.webp").touch()
    with pytest.raises(ConfigError) as caught:
        dataset.find(configure(train_data_dir=str(tmp_path)))
    for word in ("1_mixed/cut.png", "1_mixed/text.jpg", "1_mixed/empty.webp", "repair or remove"):
        assert word in str(caught.value)
    assert "good.png" not in str(caught.value)


def test_no_pictures_is_an_error_that_shows_the_layout(configure, tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ConfigError, match=r"no pictures.*10_mycat.*found only photos"):
        dataset.find(configure(train_data_dir=str(tmp_path)))


def test_pixels_cover_the_size_and_are_cropped_at_the_centre(tmp_path):
    picture = Image.new("RGB", (200, 100), (255, 0, 0))
    picture.paste((0, 0, 255), (60, 0, 140, 100))
    picture.save(tmp_path / "wide.png")
    pixels = dataset.load_pixels(dataset.Example(tmp_path / "wide.png", "", 1, (64, 64)))
    assert pixels.shape == (3, 64, 64)
    assert pixels[2, :, 10:-10].min() > 0.9
    assert pixels[0, :, :4].min() > 0.9


@pytest.mark.sd_scripts
def test_buckets_are_those_of_sd_scripts(configure, monkeypatch):
    import hosts

    monkeypatch.syspath_prepend(str(hosts.sd_scripts()))
    from library.train_util import BucketManager

    made = configure(resolution="512,512", enable_bucket=True)
    manager = BucketManager(False, made.size, made.min_bucket_reso, made.max_bucket_reso, made.bucket_reso_steps)
    manager.make_buckets()
    generator = np.random.default_rng(0)
    for width, height in generator.integers(64, 3000, size=(300, 2)).tolist():
        theirs, _, error = manager.select_bucket(width, height)
        ours = dataset.bucket((width, height), made)
        # Two buckets can be equally near.
        assert ours == theirs or abs(abs(ours[0] / ours[1] - width / height) - abs(error)) < 1e-9


def test_every_picture_is_shown_as_often_as_it_is_repeated():
    examples = [dataset.Example(Path(f"{i}"), "", 1 + i % 3, (64, 64 + 64 * (i % 2))) for i in range(20)]
    batches = dataset.Batches(examples, 4, seed=1)
    epoch = [batches[number] for number in range(batches.per_epoch)]
    shown = sorted(index for batch in epoch for index in batch)
    assert shown == sorted(index for index, example in enumerate(examples) for _ in range(example.repeats))
    assert all(len({examples[index].size for index in batch}) == 1 for batch in epoch)
    following = [batches[number] for number in range(batches.per_epoch, 2 * batches.per_epoch)]
    assert following != epoch
    assert [dataset.Batches(examples, 4, seed=1)[number] for number in range(batches.per_epoch)] == epoch
    assert [dataset.Batches(examples, 4, seed=2)[number] for number in range(batches.per_epoch)] != epoch


# One step


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
def test_the_numbers_are_the_formula(configure, monkeypatch, loss, changes):
    """Predictions and targets recorded in a real training, and base, low and high computed from them in float64."""
    passes = []
    predict = model.Model.predict

    def recording(self, latents, timesteps, *others):
        results = predict(self, latents, timesteps, *others)
        passes.append((timesteps.clone(), *(tensor.detach().double().numpy() for tensor in results)))
        return results

    monkeypatch.setattr(model.Model, "predict", recording)
    made = configure(**changes)
    outcome = training.train(made, loss)
    alphas = outcome.model.scheduler.alphas_cumprod.double().numpy()
    bands = oracle.fft_bands if loss.method == "fft" else oracle.wavelet_bands
    unified = loss.enabled and loss.timesteps == "unified"
    found = []
    for index in range(0, len(passes), 2 if unified else 1):
        timesteps, prediction, target = passes[index]
        alpha_bar = alphas[timesteps.numpy()]
        snr = alpha_bar / (1 - alpha_bar)
        weights = np.minimum(made.min_snr_gamma / snr, 1) if made.min_snr_gamma else np.ones(len(snr))
        base = (((prediction - target) ** 2).mean(axis=(1, 2, 3)) * weights).mean()
        if unified:
            timesteps, prediction, target = passes[index + 1]
            assert len(set(timesteps.tolist())) == 1
            assert 200 <= timesteps[0] < 600
        acts = loss.enabled
        if loss.timesteps == "shared":
            inside = (timesteps >= 200) & (timesteps < 600)
            assert len(set(timesteps.tolist())) == 1 if inside.all() else not inside.any()
            acts = bool(inside.all())
        share = 1 / len(timesteps) if loss.reduction == "mean" else 1.0
        low, high = oracle.loss(
            prediction,
            target,
            np.zeros_like(prediction),
            prediction_type="epsilon",
            timesteps=timesteps.numpy(),
            alphas_cumprod=alphas,
            weights=np.full(len(timesteps), share),
            bands=bands,
        )
        found.append((base, low * acts, high * acts))
    per_step = made.gradient_accumulation_steps
    for step, numbers in enumerate(outcome.history):
        expected = np.mean(found[step * per_step : (step + 1) * per_step], axis=0)
        assert (numbers.base, numbers.low, numbers.high) == pytest.approx(tuple(expected), rel=1e-4, abs=1e-9)
        total = loss.dist_match * (0.7 * expected[1] + 0.3 * expected[2])
        assert numbers.total == pytest.approx(total, rel=1e-4, abs=1e-9)
    if loss.timesteps == "shared":
        assert {numbers.total > 0 for numbers in outcome.history} == {True, False}


@pytest.mark.parametrize("timesteps", ["own", "unified"])
def test_the_share_of_the_base_gradient_and_the_cosine(configure, monkeypatch, timesteps):
    """The weight of the first step, redone from the recorded predictions."""
    from freq_loss_plugin import frequency_matching_loss

    passes, predict = [], model.Model.predict

    def recording(self, latents, at, *others):
        results = predict(self, latents, at, *others)
        passes.append((at.clone(), *(tensor.detach() for tensor in results)))
        return results

    monkeypatch.setattr(model.Model, "predict", recording)
    loss = dataclasses.replace(ON, timesteps=timesteps, min_timestep=0, max_timestep=1000, share=0.2, grad_cosine=True)
    outcome = training.train(configure(max_train_steps=1), loss)
    residual = (passes[0][1] - passes[0][2]).float()
    base = 2 * residual / residual.numel()
    at, prediction, target = passes[-1]
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
    beside = base if timesteps == "own" else (prediction - target).detach()
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), beside.flatten(), dim=0)
    (numbers,) = outcome.history
    assert numbers.others["weight"] == pytest.approx((0.2 * base.norm() / gradient.norm()).item(), rel=1e-3)
    assert numbers.others["grad_cosine"] == pytest.approx(cosine.item(), rel=1e-3)
    assert numbers.total == pytest.approx(numbers.others["weight"] * (0.7 * numbers.low + 0.3 * numbers.high), rel=1e-4)


def test_a_validation_split_is_not_trained_on_and_told_in_bands(configure, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = configure(
        validation_split=0.34, validate_every_n_steps=1, max_train_steps=2, logging_dir=str(tmp_path / "logs")
    )
    data = dataset.find(made)
    kept, held_out = dataset.split(data, made.validation_split, made.seed)
    assert len(held_out) == round(0.34 * len(data.examples)) > 0
    parts = [{each.file for each in part} for part in (kept.examples, held_out)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {each.file for each in data.examples}
    outcome = training.train(made, dataclasses.replace(ON, validation=True))
    assert f"{len(kept.examples)} pictures" in capsys.readouterr().out
    assert [each.step for each in outcome.evaluations] == [0, 1, 2]
    accumulator = EventAccumulator(str(tmp_path / "logs"))
    accumulator.Reload()
    for band in ("low", "high"):
        events = accumulator.Scalars(f"loss/validation/freq_{band}")
        assert [event.value for event in events] == pytest.approx(
            [getattr(each, band) for each in outcome.evaluations], rel=1e-4
        )
    assert len(accumulator.Images("loss/validation/freq_spectrum")) == 3
    assert len(accumulator.Scalars("loss/validation/step_average")) == 3
    training.train(configure(max_train_steps=1), dataclasses.replace(ON, validation=True))
    told = capsys.readouterr().out
    assert "set validation_split" in told
    assert "set logging_dir" in told
    with pytest.raises(ConfigError, match="leaves none to train on"):
        dataset.split(data, 0.99, 0)


def test_the_loss_changes_what_is_learned_and_nothing_else_of_the_base_pass(configure):
    plain = training.train(configure(output_name="plain", max_train_steps=1), OFF)
    ours = training.train(configure(output_name="ours", max_train_steps=1), ON)
    assert plain.history[0].base == ours.history[0].base  # same weights, pictures, noise and timesteps
    a, b = weights_of(plain.lora), weights_of(ours.lora)
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_gradients_of_two_backward_passes_are_those_of_the_sum(configure):
    """The unified pass is propagated by itself, so that one graph is alive at a time."""
    made = configure(network_train_unet_only=True)
    accelerator = training._accelerator(made)
    data = dataset.find(made)

    def gradients(one_sum):
        trainer = training.Trainer(made, ON, data, model.load(made, accelerator.device), accelerator, [], "")
        trainer._latents = trainer._encode(data.examples, "")
        losses = []
        backward = trainer._accumulate
        trainer._accumulate = losses.append if one_sum else backward
        trainer._backward(0)
        if one_sum:
            backward(sum(losses))
        return [parameter.grad.clone() for parameter in trainer._parameters if parameter.grad is not None]

    for ours, theirs in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_diverging_training_stops_and_keeps_the_last_file(configure):
    from freq_loss_plugin.step import NonFiniteLossError

    made = configure(learning_rate=1e30, save_every_n_steps=1, max_train_steps=5, max_grad_norm=0.0)
    with pytest.raises(NonFiniteLossError, match="not finite in step 2"):
        training.train(made, ON)
    saved = weights_of(made.lora_file.with_name("lora-step00000001.safetensors"))
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert not made.lora_file.exists()


def test_bf16_gradient_checkpointing_and_logs(configure, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = configure(
        mixed_precision="bf16", gradient_checkpointing=True, logging_dir=str(tmp_path / "logs"), save_precision="bf16"
    )
    outcome = training.train(made, ON)
    assert {tensor.dtype for tensor in weights_of(outcome.lora).values()} == {torch.bfloat16}
    accumulator = EventAccumulator(str(tmp_path / "logs"))
    accumulator.Reload()
    for name, values in (("loss/freq_low", "low"), ("loss/freq_share", "share")):
        logged = [event.value for event in accumulator.Scalars(name)]
        assert logged == pytest.approx([getattr(numbers, values) for numbers in outcome.history], rel=1e-5)


# What it writes


def test_the_file_is_a_kohya_lora_with_the_metadata_of_the_hook(configure):
    outcome = training.train(configure(network_dim=3, network_alpha=6.0), ON)
    found, texts = weights_of(outcome.lora), metadata_of(outcome.lora)
    names = {name.rsplit(".lora_", 1)[0] for name in found if ".lora_" in name}
    unet = [name for name in names if name.startswith("lora_unet_")]
    assert (len(unet), len(names)) == (192, 192 + 2 * 6)
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0" in names
    assert "lora_te_text_model_encoder_layers_1_mlp_fc2" in names
    for name in names:
        assert found[f"{name}.alpha"] == 6
        assert found[f"{name}.lora_down.weight"].shape[0] == found[f"{name}.lora_up.weight"].shape[1] == 3
    for key, value in ON.file_metadata("networks.lora").items():
        assert texts[key] == value
    assert texts["ss_network_module"] == "networks.lora"
    assert (texts["ss_network_dim"], texts["ss_steps"], texts["ss_base_model_version"]) == ("3", "4", "sd_v1")
    assert oct(outcome.lora.stat().st_mode & 0o777) == oct(0o666 & ~lora_file._umask())


def test_without_the_loss_the_file_does_not_mention_it(configure):
    texts = metadata_of(training.train(configure(max_train_steps=1), OFF).lora)
    assert not [key for key in texts if key.startswith("ss_freq_loss")]


def test_diffusers_loads_the_file_and_draws_the_same_picture(configure):
    from diffusers import StableDiffusionPipeline

    outcome = training.train(configure(learning_rate=1e-2, network_alpha=4.0), ON)
    sampling = comparison.Sampling(["noise, number 1", "noise, number 2"], steps=4, guidance=3.0)
    trained = comparison.sample(outcome.model, sampling, (64, 64))
    fresh = model.load(configure(), torch.device("cpu"))
    before = comparison.sample(fresh, sampling, (64, 64))
    pipeline = StableDiffusionPipeline.from_pretrained(model_folder(), torch_dtype=torch.float32, safety_checker=None)
    pipeline.load_lora_weights(str(outcome.lora))
    loaded = comparison.sample(dataclasses.replace(fresh, pipeline=pipeline, adapted={}), sampling, (64, 64))
    assert (trained - before).abs().max() > 1e-2
    torch.testing.assert_close(loaded, trained, atol=2e-5, rtol=0)


# When things go wrong


def test_a_resumed_training_is_the_uninterrupted_one(configure):
    settings_of = {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 1}
    loss = dataclasses.replace(ON, memory=3, memory_decay=0.9, share=0.1)
    whole = training.train(configure(output_name="whole", **settings_of), loss)
    first = configure(output_name="parts", save_every_n_steps=3, **settings_of)

    class KilledError(Exception):
        pass

    save = training.Trainer._save

    def die_after_saving(self, file):
        save(self, file)
        raise KilledError

    training.Trainer._save = die_after_saving
    try:
        with pytest.raises(KilledError):
            training.train(first, loss)
    finally:
        training.Trainer._save = save
    resumed = training.train(first, loss, resume=True)
    assert len(resumed.history) == 1
    assert resumed.history == whole.history[3:]
    assert_same(weights_of(resumed.lora), weights_of(whole.lora))


def test_resuming_with_other_settings_or_without_a_state_is_refused(configure):
    with pytest.raises(ConfigError, match=r"no saved state .*lora\.state.*save_every_n_steps"):
        training.train(configure(), ON, resume=True)
    training.train(configure(max_train_steps=1), ON)
    with pytest.raises(ConfigError, match=r"saved with network_dim = 4, and this training has 8"):
        training.train(configure(network_dim=8), ON, resume=True)
    with pytest.raises(ConfigError, match=r"saved with freq_loss_dist_match = 0\.05, and this training has 0\.5"):
        training.train(configure(), dataclasses.replace(ON, dist_match=0.5), resume=True)
    longer = training.train(configure(max_train_steps=2), ON, resume=True)
    assert longer.step == 2
    configure().state_file.write_bytes(b"half a file")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        training.train(configure(), ON, resume=True)


def start(folder, toml_file, *arguments, limit=None):
    """The command line of the engine in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "freq_loss_plugin", "train", "--config", str(toml_file), *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=limit,
    )


def wait_for(file, process):
    for _ in range(1200):
        if file.exists():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    pytest.fail(f"{file} did not appear")


def test_ctrl_c_saves_and_resume_goes_on(configure, tmp_path):
    made = configure(max_train_steps=10_000, save_every_n_steps=3)
    file = write_toml(tmp_path, made, dist_match=0.05)
    process = start(tmp_path, file)
    wait_for(made.state_file, process)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 130, told
    step = int(re.search(r"stopped after step (\d+) of 10000, and saved: .*\n.*--resume", told).group(1))
    assert weights_of(made.lora_file.with_name(f"lora-step{step:08d}.safetensors"))
    resumed = start(tmp_path, file, "--resume", "--max_train_steps", str(step + 1))
    told, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, told
    assert f"going on after step {step}\n" in told
    assert metadata_of(made.lora_file)["ss_steps"] == str(step + 1)


def test_a_killed_process_leaves_whole_files(configure, tmp_path):
    made = configure(max_train_steps=10_000, save_every_n_steps=1)
    process = start(tmp_path, write_toml(tmp_path, made, dist_match=0.05))
    wait_for(made.lora_file.with_name("lora-step00000003.safetensors"), process)
    process.kill()
    process.communicate()
    files = sorted(Path(made.output_dir).glob("*.safetensors"))
    assert len(files) >= 3
    for file in files:
        assert weights_of(file)
    assert torch.load(made.state_file, weights_only=True)["step"] >= 2


def test_a_full_disk_leaves_the_last_file_whole(configure, tmp_path):
    """The process may write no file larger than 1 MB, which is enough for the LoRA of rank 1 and not for its state."""
    made = configure(network_dim=1)
    training.train(dataclasses.replace(made, max_train_steps=1), ON)
    before = made.state_file.read_bytes()
    assert len(before) > 400_000
    size = len(before) // 2
    file = write_toml(tmp_path, made, dist_match=0.05)
    process = start(tmp_path, file, "--resume", limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 1, told
    assert "cannot be written" in told
    assert "Traceback" not in told
    assert made.state_file.read_bytes() == before
    assert not list(Path(made.output_dir).glob("*.part"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none", ["cannot be loaded", "diffusers folder"]),
        (lambda folder: folder, ["without model_index.json"]),
        (lambda folder: touch(folder / "model.ckpt"), ["expected .safetensors", "may run code"]),
        (lambda folder: touch(folder / "model.safetensors"), ["no whole safetensors file"]),
        (lambda folder: sdxl(folder / "model.safetensors"), ["holds no SD1.x or SD2.x", "sd-scripts"]),
        (lambda folder: index(folder, "StableDiffusionXLPipeline"), ["is a StableDiffusionXLPipeline", "sd-scripts"]),
    ],
    ids=["nothing", "empty folder", "pickle", "cut file", "sdxl file", "sdxl folder"],
)
def test_models_that_cannot_be_trained_are_named(configure, tmp_path, monkeypatch, make, words):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as caught:
        model.load(configure(pretrained_model_name_or_path=str(make(tmp_path))), torch.device("cpu"))
    for word in words:
        assert word in str(caught.value)


def touch(file):
    file.write_bytes(b"")
    return file


def sdxl(file):
    from safetensors.torch import save_file

    names = ("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x")
    save_file({name: torch.zeros(1) for name in names}, file)
    return file


def index(folder, kind):
    (folder / "model_index.json").write_text(f'{{"_class_name": "{kind}"}}')
    return folder


def test_flags_that_contradict_the_model_are_refused(configure):
    with pytest.raises(ConfigError, match=r"v_parameterization = true.*'epsilon'.*v_parameterization = false"):
        model.load(configure(v_parameterization=True), torch.device("cpu"))


# What people type


def test_the_embedded_default_trains_compares_and_draws(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "freq_loss_plugin", "train", "--max_train_steps", "3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    output = tmp_path / "output"
    for words in ("3 steps in", "on held-out pictures: L_low", "comparison.png", "kohya", "ComfyUI"):
        assert words in done.stdout
    for name, width in (("comparison.png", 1000), ("curves.png", 1000)):
        with Image.open(output / name) as picture:
            assert picture.width > width
            assert len(picture.convert("L").getcolors(256)) > 50
    plain, ours = (weights_of(output / f"tiny_lora{suffix}.safetensors") for suffix in ("-plain_mse", ""))
    assert any(not torch.equal(plain[name], ours[name]) for name in plain)
    # Its TOML is one that the engine reads, and the result of training with it is the same.
    command += ["--config", str(output / "config.toml"), "--output_name", "again"]
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert_same(weights_of(output / "again.safetensors"), ours)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "none.toml"], "--config none.toml: there is no such file"),
        (["--network_dim", "big"], "network_dim = 'big': expected a whole number"),
        (["--dist_match", "0"], "compares plain MSE with the loss"),
        (["--resume"], "no saved state in output"),
        (["--style", "weave", "--config", "none.toml"], "--style is for the embedded default"),
        (["--train_data_dir", "photos"], "--train_data_dir is for your own training"),
    ],
)
def test_wrong_arguments_are_one_message_without_a_traceback(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 1
    told = capsys.readouterr().err
    assert told.startswith("\nfreq_loss: ")
    assert words in told
