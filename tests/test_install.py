"""install.py: run as a program, on a checkout that works, on ones that do not, and as the ComfyUI Manager runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import hosts
import pytest

from kohya_patch.trainers import NEEDED

ROOT = Path(__file__).parent.parent


def install(*arguments, python=sys.executable, cwd=ROOT):
    return subprocess.run(
        [python, str(ROOT / "install.py"), *arguments], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def checkout(folder, methods):
    """A folder with a train_network.py whose trainer has these methods."""
    body = "\n".join(f"    def {name}(self, {', '.join(parameters)}): ..." for name, parameters in methods.items())
    folder.mkdir()
    (folder / "train_network.py").write_text(f"class NetworkTrainer:\n{body or '    pass'}\n")
    return folder


def needs_the_packages_of_sd_scripts():
    for name in ("accelerate", "diffusers"):
        pytest.importorskip(name)


def test_as_the_manager_runs_it_there_is_nothing_to_say(tmp_path):
    done = install(cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_folder_without_sd_scripts_is_named(tmp_path):
    needs_the_packages_of_sd_scripts()
    done = install("--sd-scripts", str(tmp_path), "--check")
    assert done.returncode == 1
    assert f"{tmp_path} has no train_network.py" in done.stdout


@pytest.mark.parametrize(
    ("missing", "words"),
    [("process_batch", "found no process_batch"), ("latents", "found no latents of get_noise_pred_and_target")],
)
def test_a_checkout_that_lacks_a_hook_point_is_refused_and_not_touched(tmp_path, missing, words):
    needs_the_packages_of_sd_scripts()
    methods = {
        name: [parameter for parameter in parameters if parameter != missing]
        for name, parameters in NEEDED.items()
        if name != missing
    }
    folder = checkout(tmp_path / "sd-scripts", methods)
    before = sorted(folder.rglob("*"))
    done = install("--sd-scripts", str(folder))
    assert done.returncode == 1
    assert words in done.stdout
    assert "git -C" in done.stdout
    assert sorted(folder.rglob("*")) == before


def test_another_python_is_told_to_activate_the_right_one(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    python = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = install("--sd-scripts", str(checkout(tmp_path / "sd-scripts", NEEDED)), "--check", python=str(python))
    assert done.returncode == 1
    assert "not the Python that runs sd-scripts" in done.stdout


def test_check_needs_a_path():
    done = install("--check")
    assert done.returncode == 2
    assert "--check needs --sd-scripts PATH" in done.stderr


@pytest.mark.host
def test_the_checkout_of_sd_scripts_is_accepted():
    sys.path.insert(0, str(ROOT))
    import install as module

    assert module.check_checkout(hosts.sd_scripts()) == []


def test_the_wheel_holds_the_two_packages_and_the_startup_file_and_nothing_else(tmp_path):
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
    assert "freq_loss_plugin/bands.py" in names
    # Python runs only lines that begin with "import ", and one line is all that it should run.
    assert startup.startswith("import sys; ")
    assert startup.count("\n") == 1


def test_the_startup_file_does_nothing_in_other_programs():
    code = f"""
import site, sys
site.addsitedir({str(ROOT / "kohya_patch")!r})
print("kohya_patch.startup" in sys.modules, [type(finder).__name__ for finder in sys.meta_path].count("_Watcher"))
"""
    command = [sys.executable, "-S", "-c", code]  # -S: whatever is installed has no say
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "False 0\n"
    command.append("train_network.py")
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "True 1\n"
