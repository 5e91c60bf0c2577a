"""``python -m freq_loss_plugin train``: the command line of the engine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..options import ConfigError
from . import demo, settings
from .comparison import OURS, Sampling, Shown, train_and_show
from .dataset import find
from .training import Outcome, train

DESCRIPTION = """\
Trains a LoRA for SD1.x or SD2.x with the frequency loss.

Without --config, on the embedded model and pictures, once with plain MSE and once with the loss, which takes minutes on
a CPU. With it, on your own: the file is a kohya TOML with a section [freq_loss]. Any key of it can also be given here
and then wins: --max_train_steps 500 --dist_match 0.01.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``train``; everything else on the command line is a key of the TOML."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", type=Path, metavar="TOML", help="a kohya TOML; the embedded default without it")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved state")
    parser.add_argument(
        "--compare", action="store_true", help="with --config: train with plain MSE, too, and draw both"
    )
    parser.add_argument("--style", choices=demo.TRAINED_STYLES, help="pictures of the embedded default (weave)")


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Train as the command line says; returns the exit status: 0, or 130 where it was interrupted.

    Raises:
        ConfigError: something of it cannot be used.
    """
    overrides = parse_overrides(rest)
    if options.config is None:
        return _run_demo(options, overrides)
    if options.style is not None:
        raise ConfigError("--style is for the embedded default; leave it out with --config")
    training, loss = settings.read_file(options.config, overrides)
    if options.compare:
        captions = [example.caption for example in find(training).examples]
        shown = train_and_show(training, loss, sampling=Sampling(captions[: demo.PROMPTS]), resume=options.resume)
        return _tell(shown, training)
    outcome = train(training, loss, resume=options.resume)
    return _tell(Shown({OURS: outcome}, []), training)


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """``--key value``, ``--key=value`` and, for options that are true or false, ``--key``.

    Raises:
        ConfigError: a word that belongs to no key, an unknown key, or a value of the wrong type.
    """
    overrides: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r}: expected --key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        overrides[key] = settings.parse_argument(key, value)
    return overrides


def _run_demo(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    for key in ("pretrained_model_name_or_path", "train_data_dir"):
        if key in overrides:
            raise ConfigError(f"--{key} is for your own training: write it into a TOML and give that to --config")
    prepared = demo.prepare(Path(overrides.get("output_dir", "output")), options.style or demo.TRAINED_STYLES[1])
    training, loss = settings.read(settings.override(prepared.values, overrides))
    if not loss.enabled:
        raise ConfigError("dist_match = 0: the embedded default compares plain MSE with the loss; give it a weight")
    if loss.guided:
        prepared.extract_features()
    toml = Path(training.output_dir) / "config.toml"
    toml.parent.mkdir(parents=True, exist_ok=True)
    toml.write_text(settings.as_toml(training, loss), encoding="utf-8")
    shown = train_and_show(
        training, loss, sampling=prepared.sampling, resume=options.resume, held_out=prepared.held_out
    )
    return _tell(shown, training, toml)


def _tell(shown: Shown, training: settings.Settings, toml: Path | None = None) -> int:
    """The summary at the end."""
    if not shown.finished:
        return 130
    print("\nDone.")
    for name, outcome in shown.outcomes.items():
        label = f"{name}: " if len(shown.outcomes) > 1 else ""
        print(f"  {label}{outcome.step} steps in {outcome.seconds:.0f} s -> {outcome.lora}")
        if outcome.evaluations:
            before, after = outcome.evaluations[0], outcome.evaluations[-1]
            print(
                f"    on held-out pictures: L_low {before.low:.4f} -> {after.low:.4f}, "
                f"L_high {before.high:.4f} -> {after.high:.4f}"
            )
    for file in shown.files:
        print(f"  {file}")
    print(_next_steps(shown.outcomes, training, toml))
    return 0


def _next_steps(outcomes: dict[str, Outcome], training: settings.Settings, toml: Path | None) -> str:
    lora = outcomes[OURS].lora
    if toml is None:
        return (
            f"\nNext\n  use it: put {lora} into ComfyUI's models/loras (node Load LoRA), or in diffusers\n"
            f'          pipeline.load_lora_weights("{lora}")\n'
            "  train longer, or anything larger: give the same TOML to sd-scripts (README, Quick start)"
        )
    return (
        f"\nNext\n  look: comparison.png and curves.png in {training.output_dir}\n"
        f"  your own model and pictures: change the paths in {toml}, then\n"
        f"      ./train_freq_aware.sh --config {toml}\n"
        "  with kohya sd-scripts, the same TOML with an SD1.5 in it (the embedded model is too narrow for it):\n"
        "      python install.py --sd-scripts PATH\n"
        "      accelerate launch train_network.py --config_file YOUR.toml\n"
        "  with ComfyUI: a LoRA of your own SD1.5 goes into models/loras; this one fits the embedded model only"
    )
