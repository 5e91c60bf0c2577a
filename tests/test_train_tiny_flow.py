"""The training of the flow-matching toy model: every stage for a few steps, on some of the emoji."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("more_itertools")
pytest.importorskip("efficientnet_lite_pytorch")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "assets"))

from make_tiny_flow import emoji, model, training

pytestmark = pytest.mark.filterwarnings("default")  # diffusers' and transformers' own

CPU = torch.device("cpu")


def test_all_stages_in_order(tmp_path, monkeypatch, capsys):
    if not (emoji.DEFAULT_FOLDER / "google").is_dir():
        pytest.skip("the emoji have not been fetched")
    some = emoji.concepts(emoji.fetch())[:32]
    monkeypatch.setattr(training, "SAMPLES", 32)
    monkeypatch.setattr(emoji, "concepts", lambda folder: some)
    options = argparse.Namespace(output=tmp_path / "model", work=tmp_path, steps=2, emoji=emoji.DEFAULT_FOLDER)
    with pytest.raises(SystemExit, match="run the stage vae first"):
        training.train_flow(options, CPU)
    training.train_vae(options, CPU)
    with pytest.raises(SystemExit, match="run the stages vae and flow"):
        training.evaluate(options, CPU)
    training.train_flow(options, CPU)
    training.evaluate(options, CPU)
    printed = capsys.readouterr().out
    assert all(f"{style}: " in printed for style in emoji.STYLES)
    assert "nearest to their own concept" in printed
    with Image.open(options.output / "samples.png") as sheet:
        assert sheet.size == (16 * emoji.SIDE, 4 * emoji.SIDE)
    made = model.load(options.output)
    latents = made.encode(torch.rand(2, 3, emoji.SIDE, emoji.SIDE))
    assert latents.shape == (2, 4, 16, 16)
    assert 0.2 < latents.std() < 5
    assert sum(file.stat().st_size for file in options.output.rglob("*") if file.is_file()) < 16e6
