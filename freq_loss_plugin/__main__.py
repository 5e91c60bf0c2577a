"""``python -m freq_loss_plugin COMMAND``: the commands of this package."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys

from . import ConfigError
from .console import print_any_text
from .training.monitor import NonFiniteLossError

# The packages that each command needs; the extra ``train`` in pyproject.toml installs all of them.
REQUIRED = {
    "train": ("diffusers", "transformers", "peft", "accelerate", "safetensors", "PIL", "matplotlib", "tqdm"),
    "inspect": ("PIL", "tqdm", "toml"),
    "extract-features": ("transformers", "safetensors", "PIL", "tqdm", "toml"),
}
MODULES = {
    "train": "freq_loss_plugin.engine.cli",
    "inspect": "freq_loss_plugin.inspection.cli",
    "extract-features": "freq_loss_plugin.guidance_token.extract",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line; that of this process by default.

    Returns:
        The exit status. An error in the user's input is printed as one message, without a traceback.
    """
    print_any_text()
    parser = argparse.ArgumentParser(prog="python -m freq_loss_plugin")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    descriptions = {
        "train": "train a LoRA with the frequency loss, without sd-scripts",
        "inspect": "show what is wrong with training images: blur, JPEG, noise, and the least timestep of each",
        "extract-features": "write the CLIP features of training images, for guidance_token",
    }
    parsers = {name: commands.add_parser(name, allow_abbrev=False, help=text) for name, text in descriptions.items()}
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments and arguments[0] in descriptions else "train"
    missing = [name for name in REQUIRED[command] if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(
            1,
            f"freq_loss_plugin: {sys.executable} lacks {', '.join(missing)}. In a clone of the repository run "
            "./train_freq_aware.sh, which creates its own environment; or: pip install 'freq-loss-plugin[train]'\n",
        )
    # At their default level they warn about optional packages that nothing here needs.
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    module = importlib.import_module(MODULES[command])
    module.add_arguments(parsers[command])
    options, rest = parser.parse_known_args(arguments)
    if rest and command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(module.run(options, rest) if command == "train" else module.run(options))
    except (ConfigError, NonFiniteLossError) as error:
        print(f"\nfreq_loss: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfreq_loss: interrupted; files saved before are intact", file=sys.stderr)
        return 130
    except OSError as error:
        hint = ". The last saved file is intact; continue with --resume" if command == "train" else ""
        print(f"\nfreq_loss: {error}{hint}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
