"""``inspect --model`` and ``--vae``: whose numbers it shows, and by which autoencoder."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import bad_images
import pytest
import torch
from bad_images import enlarged, noisy, scene
from safetensors.torch import save_file

from freq_loss_plugin.__main__ import main
from freq_loss_plugin.image_quality.measurement import measure_file
from freq_loss_plugin.image_quality.pixels import as_pixels
from freq_loss_plugin.image_quality.published import MODELS, lookup
from freq_loss_plugin.toy_model import model_folder

diffusers = pytest.importorskip("diffusers")
TOY = model_folder() / "vae"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four sharp scenes, and one of each of two defects."""
    folder = tmp_path_factory.mktemp("images") / "data"
    bad_images.write(folder / "1_sharp", [scene(number) for number in range(4)])
    bad_images.write(folder / "2_bad", [enlarged(scene(11), 8), noisy(scene(13), 20)])
    return folder


def inspect(capsys, folder, *arguments):
    """Exit status; restored fraction and least timestep of the bad images; what is printed."""
    file = folder.parent / "report.json"
    file.unlink(missing_ok=True)
    status = main(["inspect", "--train_data_dir", str(folder), "--json", str(file), *map(str, arguments)])
    printed = capsys.readouterr()
    images = json.loads(file.read_text(encoding="utf-8"))["images"] if file.is_file() else []
    bad = {
        image["file"]: (image["restored"], image["least_timestep"])
        for image in images
        if image.get("restored") is not None
    }
    return status, bad, printed.out + printed.err


@pytest.mark.parametrize("model", MODELS)
def test_the_table_of_each_model(data, capsys, model):
    _, bad, printed = inspect(capsys, data, "--model", model)
    assert bad == {file: lookup(model, measure_file(file).defect) for file in bad}
    assert len(bad) == 2
    assert f"are those of {MODELS[model].title} (--model chooses others), from a table" in printed


def test_the_threshold_of_the_run_counts(data, tmp_path, capsys):
    (tmp_path / "a.toml").write_text("[freq_loss]\nfreq_loss_image_quality_threshold = 0.4\n", encoding="utf-8")
    _, bad, _ = inspect(capsys, data, "--config_file", tmp_path / "a.toml")
    assert bad == {file: lookup("sdxl", measure_file(file).defect, 0.4) for file in bad}
    (tmp_path / "a.toml").write_text("[freq_loss]\nfreq_loss_image_quality_threshold = -1\n", encoding="utf-8")
    status, _, printed = inspect(capsys, data, "--config_file", tmp_path / "a.toml")
    assert status == 1
    assert "freq_loss_image_quality_threshold" in printed


def test_the_table_needs_no_diffusers(data):
    code = (
        "import sys\nfrom freq_loss_plugin.__main__ import main\n"
        f"assert main(['inspect', '--train_data_dir', {str(data)!r}]) == 0\n"
        "assert not {'diffusers', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_vae_of_diffusers_and_your_own_sharp_images(data, capsys):
    """By the toy model's, which hides a blur far better than the table of SD1.5."""
    _, table, _ = inspect(capsys, data, "--model", "sd15")
    status, exact, printed = inspect(capsys, data, "--model", "sd15", "--vae", TOY)
    assert status == 0
    assert f"found with {TOY} and 4 of your sharp images" in printed
    assert max(least for _, least in exact.values()) < min(least for _, least in table.values())
    later = re.search(r"(\d+) of 6 images no longer train below t = (\d+) to (\d+) \(of 1000\)", printed)
    assert later[1] == "2"


@pytest.mark.parametrize("pooled", [(), (11, 12, 13)], ids=["SD3", "FLUX.2"])
def test_a_tiny_encoder_in_one_file_is_that_of_diffusers(tmp_path, pooled):
    """In the layout of its authors; FLUX.2's has a branch beside three blocks."""
    from freq_loss_plugin.inspection.autoencoder import load_encoder

    torch.manual_seed(0)
    tiny = diffusers.AutoencoderTiny(latent_channels=16).eval()
    weights = {key.removeprefix("layers."): value for key, value in tiny.encoder.state_dict().items()}
    for number in pooled:
        first, last = torch.randn(256, 64, 1, 1), torch.randn(64, 256, 1, 1) / 16
        scale, shift = torch.randn(2, 256)

        def add(_, x, first=first, scale=scale, shift=shift, last=last):
            groups = torch.einsum("oi,bihw->bohw", first[..., 0, 0], x[0]).unflatten(1, (4, 64))
            variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True)
            normal = ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
            pooled = (normal * scale[:, None, None] + shift[:, None, None]).clamp(min=0)
            return x[0] + torch.einsum("oi,bihw->bohw", last[..., 0, 0], pooled)

        names = {"0.weight": first, "1.weight": scale, "1.bias": shift, "3.weight": last}
        weights |= {f"{number}.pool.{name}": value for name, value in names.items()}
        tiny.encoder.layers[number].register_forward_pre_hook(add)
    image = scene(1)
    with torch.no_grad():
        expected = tiny.encode(as_pixels(image)[None] * 2 - 1).latents[0]
    save_file(weights, tmp_path / "x_encoder.safetensors")
    torch.testing.assert_close(load_encoder(tmp_path / "x_encoder.safetensors")(image), expected, rtol=1e-3, atol=1e-4)


def test_a_folder_has_its_scale_and_its_shift(tmp_path):
    from freq_loss_plugin.inspection.autoencoder import load_encoder

    vae = diffusers.AutoencoderKL.from_pretrained(TOY)
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    vae.save_pretrained(tmp_path / "kl")
    tiny = diffusers.AutoencoderTiny(latent_channels=16)
    tiny.save_pretrained(tmp_path / "tiny")
    pixels = as_pixels(scene(1))[None] * 2 - 1
    with torch.no_grad():
        mean, latents = vae.encode(pixels).latent_dist.mean[0], tiny.encode(pixels).latents[0]
    torch.testing.assert_close(load_encoder(tmp_path / "kl")(scene(1)), (mean - 0.25) * 0.5)
    torch.testing.assert_close(load_encoder(tmp_path / "tiny")(scene(1)), latents)


def test_without_a_sharp_image_the_table_and_a_remark(data, capsys):
    _, bad, printed = inspect(capsys, data / "2_bad", "--vae", TOY)
    assert "--vae: no image is sharp and has sides of 64 pixels or more" in printed
    assert bad == {file: lookup("sdxl", measure_file(file).defect) for file in bad}
    assert len(bad) == 2


def wrong(tmp_path):
    """What cannot be a VAE, and what is said of it."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}', encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("hello", encoding="utf-8")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    return {
        "nowhere": "there is no such file or folder; expected a folder with",
        "empty": "No such file",
        "other": "its config.json is of UNet2DConditionModel; expected",
        "text.safetensors": "; expected a folder with",
        "a.safetensors": "; expected a folder with",
    }


def test_what_is_no_vae_is_an_error_with_what_is_expected(data, tmp_path, capsys):
    for name, words in wrong(tmp_path).items():
        status, _, printed = inspect(capsys, data, "--vae", tmp_path / name)
        assert status == 1
        assert f"--vae {tmp_path / name}: " in printed
        assert words in printed


def test_a_vae_of_another_model_is_an_error(data, capsys):
    status, _, printed = inspect(capsys, data, "--model", "flux1", "--vae", TOY)
    assert status == 1
    assert "has latents of 4 channels, and those of --model flux1 have 16; expected --model sd15 or" in printed
