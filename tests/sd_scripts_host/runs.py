"""Runs the real sd-scripts on small data and reads the files that it writes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import forks
import toml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Run:
    """One finished run of a training script."""

    folder: Path
    returncode: int
    output: str

    @cached_property
    def lora(self) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(self.folder / "lora.safetensors")

    @cached_property
    def metadata(self) -> dict[str, str]:
        from safetensors import safe_open

        with safe_open(self.folder / "lora.safetensors", "pt") as file:
            return file.metadata()

    @cached_property
    def scalars(self) -> dict[str, list[float]]:
        """What TensorBoard got, by name, in the order of the steps."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (events,) = self.folder.glob("logs/*/network_train")
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        return {tag: [event.value for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}

    def events(self, rank: int = 0) -> list[dict[str, Any]]:
        """The record that launch.py made of the passes and losses of one process."""
        import torch

        return torch.load(self.folder / ("events" if rank == 0 else f"events.{rank}"))

    def batches(self, rank: int = 0) -> list[dict[str, Any]]:
        """The training batches: each with its base pass, its base loss and, where there was one, its extra pass."""
        found: list[dict[str, Any]] = []
        extra: dict[str, Any] = {}  # comes first
        for event in (event for event in self.events(rank) if event.get("is_train")):
            if event["kind"] == "base_loss":
                found[-1] |= {key: value for key, value in event.items() if key != "kind"}
            elif event["extra"]:
                extra = {"extra": event}
            else:
                found.append({"base": event} | extra)
                extra = {}
        return found


class SdScripts:
    """A checkout of sd-scripts with a small model, a tokenizer and photos.

    ``unet_config`` is that of the model's UNet, where it is not the one that `material` makes.
    """

    def __init__(self, path: Path, material: Path, unet_config: Path | None = None) -> None:
        self.path = path
        self.material = material
        self.unet_config = unet_config

    def train(
        self,
        folder: Path,
        *arguments: str,
        script: str = "train_network.py",
        freq_loss: dict[str, Any] | None = None,
        processes: int = 1,
        timeout: int = 300,
        **settings: Any,
    ) -> Run:
        """Run the script with a TOML made of small defaults, ``settings`` and a section ``[freq_loss]``."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"training": {**self._defaults(folder), **settings}}
        if freq_loss is not None:
            config["training"].setdefault("network_module", "kohya_patch")
            config["freq_loss"] = freq_loss
        config["training"].setdefault("network_module", "networks.lora")
        (folder / "config.toml").write_text(toml.dumps(config), encoding="utf-8")
        command = [str(HERE / "launch.py"), "--record", str(folder / "events")]
        if self.unet_config is not None:
            command += ["--unet", str(self.unet_config)]
        command += [str(self.path / script), "--config_file", str(folder / "config.toml"), *arguments]
        done = forks.run(command, [ROOT], timeout, processes=processes)
        return Run(folder, done.returncode, done.stdout)

    def _defaults(self, folder: Path) -> dict[str, Any]:
        return {
            "pretrained_model_name_or_path": str(self.material / "model"),
            "tokenizer_cache_dir": str(self.material / "tokenizers"),
            "train_data_dir": str(self.material / "photos"),
            "output_dir": str(folder),
            "output_name": "lora",
            "logging_dir": str(folder / "logs"),
            "resolution": "64,64",
            "train_batch_size": 2,
            "caption_extension": ".txt",
            "max_data_loader_n_workers": 0,
            "network_dim": 4,
            "network_alpha": 4,
            "learning_rate": 1e-3,
            "max_train_steps": 4,
            "seed": 7,
            "mixed_precision": "no",
            "save_model_as": "safetensors",
            "sdpa": True,
        }
