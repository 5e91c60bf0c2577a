"""``python -m freq_loss_plugin COMMAND``: the commands of this package."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys

# What the engine is built on: the extra ``train`` in pyproject.toml.
NEEDED = ("diffusers", "transformers", "peft", "accelerate", "safetensors", "PIL", "matplotlib", "tqdm")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status. An error in what the user wrote is printed alone, without traceback."""
    parser = argparse.ArgumentParser(prog="python -m freq_loss_plugin")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", allow_abbrev=False, help="train a LoRA with the frequency loss, without sd-scripts"
    )
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(
            1,
            f"freq_loss_plugin: {sys.executable} lacks {', '.join(missing)}. In a clone of the repository run "
            "./train_freq_aware.sh, which makes an environment of its own; or: pip install 'freq-loss-plugin[train]'\n",
        )
    # They would greet every user with remarks on packages that nothing here needs.
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    cli = importlib.import_module("freq_loss_plugin.engine.cli")
    cli.add_arguments(train)
    options, rest = parser.parse_known_args(arguments)
    from . import ConfigError
    from .step import NonFiniteLossError

    try:
        return int(cli.run(options, rest))
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
