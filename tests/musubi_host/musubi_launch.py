"""Runs one real musubi-tuner script in this process, with narrowed models and, if asked, a record of its passes.

    python musubi_launch.py [--record FILE] SCRIPT ARGUMENT ...

The widths of FLUX.2's and Wan's models are constants of their modules; they are made small before the script runs with
runpy, as ``__main__``. With ``--record``, every result of ``call_dit`` and every base loss is saved to FILE (and FILE.1
in a second process), for the tests to compute with.
"""

from __future__ import annotations

import atexit
import functools
import os
import runpy
import site
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "sd_scripts_host"))
from launch import leave_frozen_models_unwrapped

FLUX_2 = {"hidden_size": 64, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [8, 8, 8, 8]}
FLUX_2 |= {"context_in_dim": 32}
WAN = {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 1}
WAN_VAE = {"dim": 16, "num_res_blocks": 1}


def main() -> None:
    arguments = sys.argv[1:]
    record = None
    if arguments[0] == "--record":
        record, arguments = arguments[1], arguments[2:]
    script = Path(arguments[0]).resolve()
    sys.path[:0] = [str(script.parent), str(script.parents[1])]
    sys.argv = [str(script), *arguments[1:]]
    # Reads the .pth file there, as Python does with those in site-packages: the working tree needs no installation.
    site.addsitedir(str(Path(__file__).resolve().parents[2] / "kohya_patch"))
    # Wan's text encoder asks for a GPU when its file is read.
    with mock.patch("torch.cuda.current_device", return_value=0):
        narrow(script.stem)
        leave_frozen_models_unwrapped()
        if record:
            _record_passes(record)
        runpy.run_path(str(script), run_name="__main__")


def narrow(script: str) -> None:
    """Make the models of a script small; to be called before one is made."""
    if script.startswith("flux_2"):
        from musubi_tuner.flux_2 import flux2_models, flux2_utils

        info = flux2_utils.FLUX2_MODEL_INFO["klein-base-4b"]
        vars(info.params).update(FLUX_2)
        flux2_models.AutoEncoderParams.__init__ = functools.partialmethod(
            flux2_models.AutoEncoderParams.__init__, ch=32, ch_mult=[1, 1, 1, 1], num_res_blocks=1
        )
    else:
        from musubi_tuner.wan.configs import WAN_CONFIGS
        from musubi_tuner.wan.modules import vae

        WAN_CONFIGS["t2v-1.3B"].update(WAN)
        vae._video_vae = functools.partial(vae._video_vae, **WAN_VAE)


def _record_passes(file: str) -> None:
    """Below anything that the plug-in puts on the trainer object: on the classes."""
    from musubi_tuner.training import trainer_base

    rank = os.environ.get("RANK", "0")
    events: list[dict[str, Any]] = []
    atexit.register(lambda: torch.save(events, file if rank == "0" else f"{file}.{rank}"))
    compute_loss = trainer_base.NetworkTrainer.compute_loss
    initialize = trainer_base.NetworkTrainer.__init__

    def compute(trainer: Any, args: Any, output: Any, timesteps: Any, *rest: Any) -> Any:
        loss, metrics = compute_loss(trainer, args, output, timesteps, *rest)
        events.append({"kind": "base_loss", "loss": loss.detach().clone()})
        return loss, metrics

    def init(trainer: Any) -> None:
        initialize(trainer)
        cls = type(trainer)
        if not hasattr(cls, "recorded"):
            cls.call_dit, cls.recorded = _recording(cls.call_dit, events), True

    trainer_base.NetworkTrainer.compute_loss, trainer_base.NetworkTrainer.__init__ = compute, init


def _recording(call_dit: Any, events: list[dict[str, Any]]) -> Any:
    @functools.wraps(call_dit)
    def call(trainer: Any, args: Any, accelerator: Any, transformer: Any, *rest: Any, **named: Any) -> Any:
        latents, batch, noise, noisy, timesteps = rest[:5]
        before = {"latents": latents, "noise": noise, "noisy": noisy, "timesteps": timesteps}
        kept = {name: value.detach().clone() for name, value in before.items()}
        output = call_dit(trainer, args, accelerator, transformer, *rest, **named)
        kept |= {"prediction": output.pred.detach().float().clone(), "target": output.target.detach().float().clone()}
        events.append({"kind": "pass", "images": batch.get("freq_loss_images"), **kept})
        return output

    return call


if __name__ == "__main__":
    main()
