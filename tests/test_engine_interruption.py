"""Ctrl-C, killed processes, full disks and divergence leave complete files."""

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

import pytest
import torch
from engine_runs import ON, load_lora, metadata_of, write_toml

from freq_loss_plugin.engine import run

# Warnings of diffusers, transformers and accelerate are not ours.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parent.parent


def test_a_diverging_run_stops_and_keeps_the_last_file(make_settings):
    from freq_loss_plugin.training.monitor import NonFiniteLossError

    run_settings = make_settings(learning_rate=1e30, save_every_n_steps=1, max_train_steps=5, max_grad_norm=0.0)
    with pytest.raises(NonFiniteLossError, match="not finite in step 2"):
        run.train(run_settings, ON)
    saved = load_lora(run_settings.lora_file.with_name("lora-step00000001.safetensors"))
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert not run_settings.lora_file.exists()


def start(folder, toml_file, *arguments, limit=None):
    """Run the engine in a separate process."""
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


def test_ctrl_c_saves_and_resume_continues(make_settings, tmp_path):
    run_settings = make_settings(max_train_steps=10_000, save_every_n_steps=3)
    file = write_toml(tmp_path, run_settings, dist_match=0.05)
    process = start(tmp_path, file)
    wait_for(run_settings.state_file, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    step = int(re.search(r"stopped after step (\d+) of 10000, and saved: .*\n.*--resume", output).group(1))
    assert load_lora(run_settings.lora_file.with_name(f"lora-step{step:08d}.safetensors"))
    resumed = start(tmp_path, file, "--resume", "--max_train_steps", str(step + 1))
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output
    assert f"continuing after step {step}\n" in output
    assert metadata_of(run_settings.lora_file)["ss_steps"] == str(step + 1)


def test_a_killed_process_leaves_complete_files(make_settings, tmp_path):
    run_settings = make_settings(max_train_steps=10_000, save_every_n_steps=1)
    process = start(tmp_path, write_toml(tmp_path, run_settings, dist_match=0.05))
    wait_for(run_settings.lora_file.with_name("lora-step00000003.safetensors"), process)
    process.kill()
    process.communicate()
    files = sorted(Path(run_settings.output_dir).glob("*.safetensors"))
    assert len(files) >= 3
    for file in files:
        assert load_lora(file)
    assert torch.load(run_settings.state_file, weights_only=True)["step"] >= 2


def test_a_full_disk_keeps_the_last_state(make_settings, tmp_path):
    """The process may write no file larger than half the state, which is enough for the LoRA but not for the state."""
    run_settings = make_settings(network_dim=1)
    run.train(dataclasses.replace(run_settings, max_train_steps=1), ON)
    before = run_settings.state_file.read_bytes()
    assert len(before) > 400_000
    size = len(before) // 2
    file = write_toml(tmp_path, run_settings, dist_match=0.05)
    process = start(tmp_path, file, "--resume", limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "cannot be written" in output
    assert "Traceback" not in output
    assert run_settings.state_file.read_bytes() == before
    assert not list(Path(run_settings.output_dir).glob("*.part"))
