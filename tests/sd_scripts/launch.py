"""Runs one real sd-scripts training script in this process, with a narrowed UNet and, if asked, a record of it.

    python launch.py [--record FILE] SCRIPT ARGUMENT ...

The UNet's widths are constants of ``library/original_unet.py``; they are narrowed before the script runs with runpy, as
``__main__``. With ``--record``, every call of ``get_noise_pred_and_target`` and every loss that ``process_batch``
returns is saved to FILE (and FILE.1, FILE.2, ... in further processes), for the tests to compute with.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    arguments = sys.argv[1:]
    record = None
    if arguments[0] == "--record":
        record, arguments = arguments[1], arguments[2:]
    script = Path(arguments[0]).resolve()
    os.chdir(script.parent)
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *arguments[1:]]
    _narrow_unet()
    if record:
        _record_passes(record)
    runpy.run_path(str(script), run_name="__main__")


def _narrow_unet() -> None:
    from library import original_unet
    from material import NARROW

    widths = NARROW["unet"]
    original_unet.BLOCK_OUT_CHANNELS = widths
    original_unet.TIMESTEP_INPUT_DIM = widths[0]
    original_unet.TIME_EMBED_DIM = widths[0] * 4


def _record_passes(record: str) -> None:
    """Wrap the class methods when the trainer starts, below anything that the plug-in puts on the object."""
    import torch
    from library import train_util

    events: list[dict] = []
    verify = train_util.verify_training_args

    def start_recording(args):
        trainer_class = type(sys._getframe(1).f_locals["self"])
        get_pass, process = trainer_class.get_noise_pred_and_target, trainer_class.process_batch

        @functools.wraps(get_pass)
        def get_noise_pred_and_target(self, *positional, **named):
            results = get_pass(self, *positional, **named)
            prediction, target, timesteps, _ = results
            events.append(
                {
                    "kind": "pass",
                    "prediction": prediction.detach().clone(),
                    "target": target.detach().clone(),
                    "timesteps": timesteps.detach().clone(),
                    "is_train": named.get("is_train", True),
                }
            )
            return results

        @functools.wraps(process)
        def process_batch(self, batch, *positional, **named):
            loss = process(self, batch, *positional, **named)
            kept = {
                key: batch[key] for key in ("loss_weights", "alpha_masks", "image_keys") if batch.get(key) is not None
            }
            events.append({"kind": "base_loss", "loss": loss.detach().clone(), **kept})
            return loss

        trainer_class.get_noise_pred_and_target = get_noise_pred_and_target
        trainer_class.process_batch = process_batch
        return verify(args)

    train_util.verify_training_args = start_recording

    import atexit

    rank = int(os.environ.get("RANK", "0"))
    atexit.register(lambda: torch.save(events, f"{record}.{rank}" if rank else record))


if __name__ == "__main__":
    main()
