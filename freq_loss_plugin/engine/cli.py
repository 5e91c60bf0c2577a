"""``python -m freq_loss_plugin train``: the command line of the engine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..options import reference
from ..options.config import FreqLossConfig
from ..options.fields import ConfigError
from . import demo, settings
from .comparison import FREQUENCY_AWARE, Comparison, Sampling, train_and_compare
from .dataset import find
from .outcome import Outcome
from .run import train

DESCRIPTION = """\
Trains a LoRA for SD1.x or SD2.x with the frequency loss.

Without --config, this runs a demo on a toy model and synthetic images, most of them bad: once with plain MSE, and once
with a balanced base loss and the latents of bad images restored. It takes minutes on a CPU. With --config, it trains on
your own images: the file is a kohya TOML with a section [freq_loss]. Its keys can also be given on the command line,
which takes precedence: --max_train_steps 500.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``train``, and every key of the TOML."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", type=Path, metavar="TOML", help="a kohya TOML; without it, the demo runs")
    parser.add_argument("--resume", action="store_true", help="continue from the last saved state")
    parser.add_argument(
        "--compare", action="store_true", help="with --config: also train with plain MSE, and plot both"
    )
    parser.add_argument("--style", choices=demo.TRAINED_STYLES, help="of the demo's images (default: frames)")
    loss, training = (parser.add_argument_group(name) for name in ("frequency loss", "training, as in sd-scripts"))
    reference.add_to_parser(loss, FreqLossConfig, without=("min_snr_gamma",))  # the trainer has it, too
    reference.add_to_parser(training, settings.Settings)


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Train as the command line says; returns the exit status: 0, or 130 where it was interrupted.

    Args:
        options: what the parser of `add_arguments` read.
        rest: the arguments that it did not recognize.

    Raises:
        ConfigError: an argument, the data or the model cannot be used.
    """
    overrides = read_overrides(options, rest)
    if options.config is None:
        return _run_demo(options, overrides)
    if options.style is not None:
        raise ConfigError("--style belongs to the demo; leave it out with --config")
    training, loss = settings.read_file(options.config, overrides)
    if options.compare:
        captions = [example.caption for example in find(training).examples]
        sampling = Sampling(captions[: demo.PROMPTS])
        compared = train_and_compare(training, loss, sampling=sampling, resume=options.resume)
        return _summarize(compared, training)
    outcome = train(training, loss, resume=options.resume)
    return _summarize(Comparison({FREQUENCY_AWARE: outcome}, []), training)


def read_overrides(options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """The keys of the TOML that are given on the command line.

    Raises:
        ConfigError: an unknown key, an argument that is no option, or a value of the wrong type.
    """
    if rest:
        if not rest[0].startswith("--"):
            raise ConfigError(f"{rest[0]!r}: expected --key value")
        raise settings.unknown_key(rest[0][2:].partition("=")[0])
    return reference.given(options, settings.Settings, FreqLossConfig)


def _run_demo(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    for key in ("pretrained_model_name_or_path", "train_data_dir"):
        if key in overrides:
            raise ConfigError(
                f"--{key}: the demo has a model and images of its own; write the key into a TOML for --config"
            )
    prepared = demo.prepare(Path(overrides.get("output_dir", "output")), options.style or demo.TRAINED_STYLES[0])
    training, loss = settings.read(settings.override(prepared.values, overrides))
    if not loss.changes_training:
        raise ConfigError(
            "dist_match = 0 without freq_loss_balance or freq_loss_image_quality: the demo compares plain MSE with "
            "them; set one of the three"
        )
    if loss.guided:
        prepared.extract_features()
    toml = Path(training.output_dir) / "config.toml"
    toml.parent.mkdir(parents=True, exist_ok=True)
    toml.write_text(settings.as_toml(training, loss), encoding="utf-8")
    compared = train_and_compare(
        training, loss, sampling=prepared.sampling, resume=options.resume, held_out=prepared.held_out
    )
    return _summarize(compared, training, toml)


def _summarize(compared: Comparison, training: settings.Settings, toml: Path | None = None) -> int:
    """Print the results and what to do next; returns the exit status."""
    if not compared.finished:
        return 130
    print("\nDone.")
    for name, outcome in compared.outcomes.items():
        label = f"{name}: " if len(compared.outcomes) > 1 else ""
        print(f"  {label}{outcome.step} steps in {outcome.seconds:.0f} s -> {outcome.lora}")
        if outcome.evaluations:
            print(f"    validation error, of what it was before: {_relative_errors(outcome)}")
    for file in compared.files:
        print(f"  {file}")
    print(_next_steps(compared.outcomes[FREQUENCY_AWARE].lora, training, toml))
    return 0


def _relative_errors(outcome: Outcome) -> str:
    """Geometric means over the timesteps of the lower and the upper half, both bands together."""
    before, after = outcome.errors
    lower, upper = ((after / before).log().mean(dim=0).chunk(2)[half].mean().exp() for half in (0, 1))
    return f"{lower:.0%} at low noise levels, {upper:.0%} at high ones"


def _next_steps(lora: Path, training: settings.Settings, toml: Path | None) -> str:
    if toml is None:
        return (
            f"\nNext\n  use it: put {lora} into ComfyUI's models/loras (node Load LoRA), or in diffusers\n"
            f'          pipeline.load_lora_weights("{lora}")\n'
            "  train for longer, or train a larger model: use the same TOML with sd-scripts (see the README)"
        )
    return (
        f"\nNext\n  look at comparison.png and curves.png in {training.output_dir}\n"
        f"  train on your own model and images: change the paths in {toml}, then\n"
        f"      ./train_freq_aware.sh --config {toml}\n"
        "  with kohya sd-scripts, use the same TOML with an SD1.5 model (the toy model is too narrow for it):\n"
        "      python install.py --sd-scripts PATH\n"
        "      accelerate launch train_network.py --config_file YOUR.toml\n"
        "  in ComfyUI, a LoRA of your own SD1.5 goes into models/loras; this one fits the toy model only"
    )
