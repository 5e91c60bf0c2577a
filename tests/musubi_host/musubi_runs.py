"""Runs the real musubi-tuner on small data; its files are read like those of sd-scripts (`sd_scripts_host/runs.py`)."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import forks
import toml
from runs import ROOT, Run

HERE = Path(__file__).resolve().parent
# What a trainer needs of its own.
SETTINGS: dict[str, dict[str, Any]] = {
    "flux_2": {"model_version": "klein-base-4b", "timestep_sampling": "flux2_shift", "mixed_precision": "bf16"},
    "wan": {"task": "t2v-1.3B", "timestep_sampling": "shift", "discrete_flow_shift": 3.0},
}


class MusubiTuner:
    """A checkout of musubi-tuner with a small model of one architecture, photos or clips, and their caches."""

    def __init__(self, path: Path, architecture: str, folder: Path) -> None:
        self.path, self.architecture, self.folder = path, architecture, folder
        self._check(self._call([str(HERE / "musubi_material.py"), architecture, str(folder)]))
        if architecture == "flux_2":
            self.cache(folder / "images", folder / "cache")

    def dataset(self, file: Path, images: Path, cache: Path, **options: Any) -> Path:
        """Write a dataset config for images or, for Wan, clips whose caches are there."""
        general = {"resolution": [128, 128], "caption_extension": ".txt", "batch_size": 2, "enable_bucket": False}
        source = {"video_directory": str(images), "target_frames": [9]}
        if self.architecture == "flux_2":
            source = {"image_directory": str(images)}
        file.write_text(
            toml.dumps({"general": general | options, "datasets": [source | {"cache_directory": str(cache)}]})
        )
        return file

    def cache(self, images: Path, cache: Path, **options: Any) -> None:
        """Cache the latents of images by musubi-tuner's own script; ``options`` are those of `dataset`."""
        config = self.dataset(cache / "dataset.toml", images, cache, **options)
        script = self.path / "src" / "musubi_tuner" / "flux_2_cache_latents.py"
        options = ["--model_version", "klein-base-4b", "--dataset_config", str(config)]
        options += ["--vae", str(self.folder / "vae.safetensors")]
        self._check(self._call([str(HERE / "musubi_launch.py"), str(script), *options]))

    def train(
        self,
        folder: Path,
        *arguments: str,
        freq_loss: dict[str, Any] | None = None,
        processes: int = 1,
        wrapper: bool = False,
        **settings: Any,
    ) -> Run:
        """Run the training script with a TOML made of small defaults, ``settings`` and a section ``[freq_loss]``."""
        folder.mkdir(parents=True, exist_ok=True)
        images = self.folder / "images"
        defaults = {"dataset_config": str(self.dataset(folder / "dataset.toml", images, self.folder / "cache"))}
        values = defaults | self._defaults(folder) | SETTINGS[self.architecture] | settings
        own = "networks.lora_flux_2" if self.architecture == "flux_2" else "networks.lora_wan"
        config: dict[str, Any] = {"training": values}
        if freq_loss is not None:
            values.setdefault("network_module", "kohya_patch")
            config["freq_loss"] = freq_loss
        values.setdefault("network_module", own)
        (folder / "config.toml").write_text(toml.dumps(config), encoding="utf-8")
        script = self.path / ("" if wrapper else "src/musubi_tuner") / f"{self.architecture}_train_network.py"
        command = [str(HERE / "musubi_launch.py"), "--record", str(folder / "events"), str(script)]
        done = self._call([*command, "--config_file", str(folder / "config.toml"), *arguments], processes)
        return Run(folder, done.returncode, done.stdout)

    def _call(self, command: list[str], processes: int = 1) -> subprocess.CompletedProcess[str]:
        return forks.run(command, [ROOT, self.path / "src", HERE], timeout=300, processes=processes)

    @staticmethod
    def _check(done: subprocess.CompletedProcess[str]) -> None:
        assert done.returncode == 0, done.stdout

    def _defaults(self, folder: Path) -> dict[str, Any]:
        return {
            "dit": str(self.folder / "dit.safetensors"),
            "output_dir": str(folder),
            "output_name": "lora",
            "logging_dir": str(folder / "logs"),
            "max_data_loader_n_workers": 0,
            "network_dim": 4,
            "network_alpha": 4,
            "learning_rate": 1e-3,
            "optimizer_type": "AdamW",
            "max_train_steps": 4,
            "seed": 7,
            "mixed_precision": "no",
            "sdpa": True,
        }
