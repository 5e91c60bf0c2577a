"""install.py, run as a program: on working and broken checkouts of sd-scripts, and as the ComfyUI Manager runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import forks
import hosts
import pytest

ROOT = Path(__file__).parent.parent


def install(*arguments, python=sys.executable, cwd=ROOT):
    return subprocess.run(
        [python, str(ROOT / "install.py"), *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def copied(tmp_path):
    """A copy of the part of the checkout that train_network.py imports, for tests that modify it."""
    source = hosts.sd_scripts()
    folder = tmp_path / "sd-scripts"
    for name in ("library", "networks"):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    shutil.copy(source / "train_network.py", folder)
    return folder


def rename_everywhere(folder, old, new):
    """Rename a function of the copied sd-scripts, as a newer version might have done."""
    for file in folder.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        file.write_text(re.sub(rf"\b{old}\b", new, text), encoding="utf-8")


def install_module():
    sys.path.insert(0, str(ROOT))
    import install as module

    return module


def test_the_manager_run_is_silent_when_nothing_is_missing(tmp_path):
    done = install(cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("program", ["sd-scripts", "musubi-tuner"])
def test_a_folder_without_the_program_is_named_whatever_packages_there_are(tmp_path, program):
    done = install(f"--{program}", str(tmp_path), "--check")
    assert done.returncode == 1
    assert re.search(
        rf"{tmp_path} has no [\w/]*train_network.py: expected the folder of kohya-ss/{program}", done.stdout
    )


@pytest.mark.sd_scripts
@pytest.mark.long
@pytest.mark.parametrize(
    ("old", "words"),
    [
        ("text_encoder_conds", "looked for text_encoder_conds among the parameters of NetworkTrainer.get_noise_pred"),
        ("get_timesteps", "looked for the calls get_noise_pred_and_target -> get_noise_noisy_latents_and_timesteps ->"),
        ("apply_masked_loss", "looked for a call of apply_masked_loss in NetworkTrainer.process_batch"),
        ("val_dataset_group", "looked for val_dataset_group among the variables of train"),
        ("buckets_indices", "looked for buckets_indices among the names in DreamBoothDataset.__getitem__"),
    ],
)
def test_a_hook_point_that_is_not_there_is_named(copied, old, words):
    rename_everywhere(copied, old, f"{old}_2")
    check = ["-m", "kohya_patch.sd_scripts.host_check", "train_network.py"]
    done = forks.run(check, [ROOT], timeout=300, folder=copied)
    assert done.returncode == 0, done.stdout
    problem = json.loads(done.stdout.splitlines()[-1])["problems"]["train_network.py"]
    assert words in problem
    assert "Update sd-scripts where it is older" in problem


@pytest.mark.sd_scripts
@pytest.mark.long
def test_a_checkout_that_lacks_a_hook_point_is_refused_and_not_touched(copied):
    rename_everywhere(copied, "process_batch", "process_batch_2")
    before = sorted(copied.rglob("*"))
    done = install("--sd-scripts", str(copied))
    assert done.returncode == 1
    assert "looked for the method process_batch in NetworkTrainer, and found none of that name" in done.stdout
    assert sorted(copied.rglob("*")) == before


@pytest.mark.sd_scripts
@pytest.mark.long
def test_a_checkout_that_cannot_be_imported_says_why(copied):
    script = copied / "train_network.py"
    script.write_text("import a_missing_package\n" + script.read_text(encoding="utf-8"), encoding="utf-8")
    done = install("--sd-scripts", str(copied), "--check")
    assert done.returncode == 1
    assert "cannot be imported by this Python: ModuleNotFoundError: No module named 'a_missing_package'" in done.stdout


@pytest.fixture
def site(tmp_path):
    """A folder whose sitecustomize.py stands in for the .pth file of an installed plug-in."""
    folder = tmp_path / "site"
    folder.mkdir()
    lines = ("import site, sys", f"sys.path.append({str(ROOT)!r})", f"site.addsitedir({str(ROOT / 'kohya_patch')!r})")
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    return folder


@pytest.mark.sd_scripts
def test_every_trainer_of_the_checkout_is_accepted_and_checks_early(site, monkeypatch):
    module = install_module()
    scripts = {path.name for path in hosts.sd_scripts().glob("*train_network.py")}
    report = {"problems": dict.fromkeys(scripts), "checks_early": True}
    assert module.check_host(module.SD_SCRIPTS, hosts.sd_scripts(), plugin=site) == report
    monkeypatch.setattr(module, "check_host", lambda *_, **__: report)  # the same again
    assert module.check_checkout(module.SD_SCRIPTS, hosts.sd_scripts()) == []


@pytest.mark.sd_scripts
@pytest.mark.long
def test_an_early_check_is_promised_only_where_there_is_one(copied, site):
    module = install_module()
    rename_everywhere(copied, "verify_training_args", "verify_the_arguments")
    assert module.check_host(module.SD_SCRIPTS, copied, plugin=site) == {
        "problems": {"train_network.py": None},
        "checks_early": False,
    }


def test_a_python_without_the_packages_is_refused_with_a_hint(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    python = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = install("--sd-scripts", str(tmp_path), "--check", python=str(python))
    assert done.returncode == 1
    assert "not the Python that runs sd-scripts" in done.stdout


def test_check_needs_a_path():
    done = install("--check")
    assert done.returncode == 2
    assert "--check needs --sd-scripts PATH" in done.stderr


def test_the_wheel_contains_the_two_packages_and_the_startup_file_only(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        startup = wheel.read("freq_loss_plugin_startup.pth").decode()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "freq_loss_plugin",
        "kohya_patch",
        "freq_loss_plugin_startup.pth",
    }
    assert "freq_loss_plugin/loss/bands.py" in names
    # Python runs only lines that begin with "import "; there must be exactly one.
    assert startup.startswith("import sys; ")
    assert startup.count("\n") == 1


def test_the_startup_file_does_nothing_in_other_programs():
    code = f"""
import site, sys
site.addsitedir({str(ROOT / "kohya_patch")!r})
print("kohya_patch.startup" in sys.modules, [type(finder).__name__ for finder in sys.meta_path].count("_Watcher"))
"""
    command = [sys.executable, "-S", "-c", code]  # -S ignores installed packages
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "False 0\n"
    command.append("train_network.py")
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "True 1\n"


@pytest.mark.musubi_tuner
def test_musubi_tuner_is_checked_by_its_own_code():
    checkout = hosts.musubi_tuner()
    done = install("--musubi-tuner", str(checkout), "--check")
    for script in ("flux_2", "qwen_image", "zimage", "hv"):
        assert f"usable       {script}_train_network.py" in done.stdout
    reasons = {"hidream_o1": "predicts patches of pixels", "minimax_h3": "trains video and audio together"}
    for script in checkout.glob("src/musubi_tuner/*_train_network.py"):
        reason = reasons.get(script.stem.removesuffix("_train_network"))
        assert not reason or re.search(rf"not usable +{script.name}: {reason}", done.stdout)
    assert done.stdout.count("musubi-tuner ") >= 1


@pytest.mark.musubi_tuner
def test_a_musubi_tuner_without_a_seam_is_told_what_is_missing(tmp_path):
    folder = tmp_path / "musubi-tuner"
    shutil.copytree(hosts.musubi_tuner() / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    rename_everywhere(folder / "src", "extra_step_logs", "more_step_logs")
    done = install("--musubi-tuner", str(folder), "--check")
    assert done.returncode == 1
    assert "looked for the method extra_step_logs in HunyuanVideoNetworkTrainer" in done.stdout
    assert "0.3.4" in done.stdout
