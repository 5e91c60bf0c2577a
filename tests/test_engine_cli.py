"""``python -m freq_loss_plugin train``, as users call it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_runs import load_lora, quick_demo
from PIL import Image

from freq_loss_plugin.__main__ import main

# Warnings of diffusers, transformers and accelerate are not ours.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parent.parent


def test_the_demo_trains_compares_and_plots(tmp_path, monkeypatch, capsys):
    quick_demo(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--max_train_steps", "3"]) == 0
    printed, output = capsys.readouterr().out, tmp_path / "output"
    for words in ("3 steps in", "% at high ones", "6 full quality", "comparison.png", "kohya", "ComfyUI"):
        assert words in printed
    for name, width in (("comparison.png", 300), ("curves.png", 1000)):
        with Image.open(output / name) as image:
            assert image.width > width
            assert len(image.convert("L").getcolors(256)) > 50
    plain, ours = (load_lora(output / f"tiny_lora{suffix}.safetensors") for suffix in ("-plain_mse", ""))
    assert any(not torch.equal(plain[name], ours[name]) for name in plain)
    # Training with the TOML that it wrote gives the same LoRA.
    assert main(["train", "--config", "output/config.toml", "--output_name", "again"]) == 0
    torch.testing.assert_close(load_lora(output / "again.safetensors"), ours, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "none.toml"], "--config none.toml: there is no such file"),
        (["--network_dim", "big"], "network_dim = 'big': expected a whole number"),
        (
            ["--freq_loss_balance", "off", "--freq_loss_image_quality", "off"],
            "compares plain MSE with them",
        ),
        (["--resume"], "no saved state in output"),
        (["--style", "weave", "--config", "none.toml"], "--style belongs to the demo"),
        (["--train_data_dir", "photos"], "the demo has a model and images of its own"),
    ],
)
def test_wrong_arguments_are_one_message_without_a_traceback(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 1
    output = capsys.readouterr().err
    assert output.startswith("\nfreq_loss: ")
    assert words in output
