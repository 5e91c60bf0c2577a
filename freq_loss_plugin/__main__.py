"""``python -m freq_loss_plugin COMMAND``: the commands of this package."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys

# What the commands are built on: the extra ``train`` in pyproject.toml has it all.
NEEDED = {
    "train": ("diffusers", "transformers", "peft", "accelerate", "safetensors", "PIL", "matplotlib", "tqdm"),
    "extract-features": ("transformers", "safetensors", "PIL", "tqdm", "toml"),
}
MODULES = {"train": "freq_loss_plugin.engine.cli", "extract-features": "freq_loss_plugin.engine.extraction"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status. An error in what the user wrote is printed alone, without traceback."""
    parser = argparse.ArgumentParser(prog="python -m freq_loss_plugin")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    named = {
        "train": "train a LoRA with the frequency loss, without sd-scripts",
        "extract-features": "write the CLIP features of training pictures, for guidance_token",
    }
    parsers = {name: commands.add_parser(name, allow_abbrev=False, help=words) for name, words in named.items()}
    words = sys.argv[1:] if arguments is None else arguments
    command = words[0] if words and words[0] in named else "train"
    missing = [name for name in NEEDED[command] if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(
            1,
            f"freq_loss_plugin: {sys.executable} lacks {', '.join(missing)}. In a clone of the repository run "
            "./train_freq_aware.sh, which makes an environment of its own; or: pip install 'freq-loss-plugin[train]'\n",
        )
    # They would greet every user with remarks on packages that nothing here needs.
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    module = importlib.import_module(MODULES[command])
    module.add_arguments(parsers[command])
    options, rest = parser.parse_known_args(arguments)
    if rest and command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from . import ConfigError
    from .step import NonFiniteLossError

    try:
        return int(module.run(options, rest) if command == "train" else module.run(options))
    except (ConfigError, NonFiniteLossError) as error:
        print(f"\nfreq_loss: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfreq_loss: interrupted; what was saved before is intact", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"\nfreq_loss: {error}. The last saved file is intact; go on with --resume", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
