"""Runs one real sd-scripts training script in this process, with a narrowed UNet and, if asked, a record of it.

    python launch.py [--record FILE] [--unet CONFIG.json] SCRIPT ARGUMENT ...

The UNet's widths and groups are constants of ``library/original_unet.py``; they are set to those of a diffusers UNet's
config, or to the small ones of `material`, before the script runs with runpy, as ``__main__``. With ``--record``, every
call of ``get_noise_pred_and_target``, every loss that ``process_batch`` returns, and the text that the UNet is given
while it samples, is saved to FILE (and FILE.1, FILE.2, ... in further processes), for the tests to compute with.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import json
import os
import runpy
import site
import sys
from pathlib import Path


def main() -> None:
    arguments = sys.argv[1:]
    record = None
    if arguments[0] == "--record":
        record, arguments = arguments[1], arguments[2:]
    unet_config = None
    if arguments[0] == "--unet":
        unet_config, arguments = Path(arguments[1]).resolve(), arguments[2:]
    script = Path(arguments[0]).resolve()
    os.chdir(script.parent)
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *arguments[1:]]
    # Reads the .pth file there, as Python does with those in site-packages: the working tree needs no installation.
    site.addsitedir(str(Path(__file__).resolve().parents[2] / "kohya_patch"))
    narrow_unet(unet_config)
    leave_frozen_models_unwrapped()
    if record:
        _record_passes(record)
    runpy.run_path(str(script), run_name="__main__")


def narrow_unet(config: Path | None) -> None:
    """Give sd-scripts' UNet other widths and groups than SD1.5's; to be called before one is made."""
    from library import original_unet
    from material import NARROW

    found = json.loads(config.read_text()) if config else {"block_out_channels": NARROW["unet"], "norm_num_groups": 32}
    widths = tuple(found["block_out_channels"])
    original_unet.BLOCK_OUT_CHANNELS = widths
    original_unet.TIMESTEP_INPUT_DIM = widths[0]
    original_unet.TIME_EMBED_DIM = widths[0] * 4
    original_unet.NORM_GROUPS = original_unet.TRANSFORMER_NORM_NUM_GROUPS = found["norm_num_groups"]


def leave_frozen_models_unwrapped() -> None:
    """On several GPUs, accelerate wraps only models with trainable parameters for DDP; on several CPUs it wraps all."""
    import accelerate

    prepare_model = accelerate.Accelerator.prepare_model

    @functools.wraps(prepare_model)
    def prepare(self, model, *positional, **named):
        if self.num_processes == 1 or any(parameter.requires_grad for parameter in model.parameters()):
            return prepare_model(self, model, *positional, **named)
        return prepare_model(self, model, *positional, **{**named, "evaluation_mode": True})

    accelerate.Accelerator.prepare_model = prepare


class _Recorder:
    """Records passes, base losses and samples of a run, below anything that the plug-in puts on the trainer object."""

    def __init__(self, args, trainer_class):
        from library import original_unet

        self._args = args
        self.events: list[dict] = []
        self._inside_process_batch = False
        self._wrap(trainer_class, "get_noise_pred_and_target", self._pass)
        self._wrap(trainer_class, "process_batch", self._process_batch)
        self._wrap(original_unet.UNet2DConditionModel, "forward", self._forward)

    @staticmethod
    def _wrap(cls, name, wrapper):
        method = getattr(cls, name)

        @functools.wraps(method)
        def wrapped(*positional, **named):
            call = inspect.signature(method).bind(*positional, **named)
            call.apply_defaults()
            return wrapper(lambda: method(*positional, **named), call.arguments)

        setattr(cls, name, wrapped)

    def _pass(self, run, given):
        results = run()
        event = dict(zip(("prediction", "target", "timesteps"), results[:3], strict=True))
        event["states"] = given["text_encoder_conds"][0]
        event = {key: tensor.detach().clone() for key, tensor in event.items()}
        event["captions"] = list(given["batch"]["captions"])
        is_extra = given["args"] is not self._args
        self.events.append({"kind": "pass", "extra": is_extra, "is_train": bool(given["is_train"]), **event})
        return results

    def _process_batch(self, run, given):
        self._inside_process_batch = True
        loss = run()
        self._inside_process_batch = False
        batch = given["batch"]
        kept = {key: batch[key] for key in ("loss_weights", "alpha_masks") if batch.get(key) is not None}
        is_train = bool(given["is_train"])
        self.events.append({"kind": "base_loss", "is_train": is_train, "loss": loss.detach().clone(), **kept})
        return loss

    def _forward(self, run, given):
        import torch

        if not self._inside_process_batch and not torch.is_grad_enabled():
            self.events.append({"kind": "sample", "states": given["encoder_hidden_states"].detach().clone()})
        return run()


def _record_passes(record: str) -> None:
    """Wrap the class methods when the trainer starts, and write at the end what was recorded."""
    import torch

    verifying = _module_of_the_first_call()
    verify = verifying.verify_training_args

    def start_recording(args):
        trainer_class = type(sys._getframe(1).f_locals.get("self"))
        if hasattr(trainer_class, "process_batch"):
            recorder = _Recorder(args, trainer_class)
            rank = int(os.environ.get("RANK", "0"))
            atexit.register(lambda: torch.save(recorder.events, f"{record}.{rank}" if rank else record))
        return verify(args)

    verifying.verify_training_args = start_recording


def _module_of_the_first_call():
    """Where trainers look up the first function that they call; since v0.11 ``train_util`` only re-exports it."""
    from library import train_util

    return sys.modules[train_util.verify_training_args.__module__]


if __name__ == "__main__":
    main()
