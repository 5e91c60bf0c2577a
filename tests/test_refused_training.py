"""Runs of sd-scripts that cannot work are refused before any model is loaded."""

from __future__ import annotations

import subprocess

import hosts
import pytest
from recorded_runs import needs

pytestmark = [pytest.mark.sd_scripts, pytest.mark.long]

# As much of the message as fits into one line of the log.
LOADS_THE_MODEL = "load Diffusers pretrained"


@pytest.mark.parametrize(
    ("freq_loss", "arguments", "words"),
    [
        ({"method": "fft"}, (), ["method: unknown option in [freq_loss]", "Did you mean freq_loss_method?"]),
        ({}, ("--network_args", "dist_match=much"), ["dist_match = 'much'", "a number"]),
        ({"freq_loss_network_module": "networks.lorra"}, (), ["'networks.lorra'", "no such Python module"]),
        ({"freq_loss_levels": 4}, (), ["freq_loss_levels = 4", "8 × 8", "freq_loss_levels = 3"]),
    ],
    ids=["section", "network_args", "module", "size"],
)
def test_wrong_options_stop_before_any_model_is_loaded(sd_scripts, plain_run, tmp_path, freq_loss, arguments, words):
    run = sd_scripts.train(tmp_path, *arguments, freq_loss=freq_loss)
    assert run.returncode == 1
    message = run.output[run.output.index("\nfreq_loss: ") :]
    assert "Traceback" not in message
    for word in words:
        assert word in message
    assert LOADS_THE_MODEL not in run.output
    assert LOADS_THE_MODEL in plain_run.output
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("script", ["train_leco.py", "sdxl_train_leco.py"])
@pytest.mark.parametrize("weights", [False, True], ids=["new", "continued"])
def test_scripts_that_train_on_prompts_are_refused_before_any_model_is_loaded(
    sd_scripts, plain_run, tmp_path, script, weights
):
    needs(sd_scripts, script)
    (tmp_path / "prompts.toml").write_text('[[prompts]]\ntarget = "a cat"\n')
    trained = {"network_weights": str(plain_run.folder / "lora.safetensors"), "dim_from_weights": True}
    settings = trained if weights else {}
    prompts = ("--prompts_file", str(tmp_path / "prompts.toml"))
    run = sd_scripts.train(tmp_path, *prompts, script=script, freq_loss={"dist_match": 0.01}, **settings)
    assert run.returncode == 1, run.output
    message = run.output[run.output.index("\nfreq_loss: ") :]
    for words in (
        f"network_module = 'kohya_patch' in {script}",
        "batches of images",
        'network_module = "networks.lora"',
    ):
        assert words in message
    assert "Traceback" not in message
    assert LOADS_THE_MODEL not in run.output


def archived(commit, folder):
    """Another version of sd-scripts, from the history of the checkout."""
    folder.mkdir(parents=True)
    source = hosts.sd_scripts()
    exists = subprocess.run(["git", "-C", source, "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True)
    if exists.returncode:
        pytest.skip(f"the checkout of sd-scripts has no history back to {commit}")
    archive = subprocess.run(
        ["git", "-C", source, "archive", commit, "train_network.py", "library", "networks"],
        check=True,
        capture_output=True,
    )
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    return folder


def test_sd_scripts_without_the_hook_points_is_refused_before_any_model_is_loaded(material, plain_run, tmp_path):
    from runs import SdScripts

    ancient = SdScripts(archived("v0.9.1", tmp_path / "sd-scripts"), material)
    run = ancient.train(tmp_path / "run", freq_loss={"dist_match": 0.01})
    assert run.returncode != 0
    for words in ("looked for the method process_batch in NetworkTrainer", "v0.9.1 and older", "git pull"):
        assert words in run.output
    assert LOADS_THE_MODEL not in run.output
    assert LOADS_THE_MODEL in plain_run.output
