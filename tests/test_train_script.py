"""train_freq_aware.sh from a fresh clone: it creates an environment and trains in another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from freq_loss_plugin.engine import environment

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the files that git tracks or would track."""
    folder = tmp_path_factory.mktemp("clone")
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def environment_of(clone, venv, **changes):
    made = {**os.environ, "VENV": str(venv), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **changes}
    made.pop("PYTHONPATH", None)
    return made


def bootstrap(clone, venv, *arguments, script="train_freq_aware.sh", **changes):
    command = ["bash", str(clone / script), *arguments]
    variables = environment_of(clone, venv, **changes)
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture
def without_installing(clone, tmp_path):
    """A clone whose environments borrow the packages of this one and install nothing."""
    folder = tmp_path / "clone"
    (folder / "freq_loss_plugin" / "engine").mkdir(parents=True)
    for name in ("train_freq_aware.sh", "pyproject.toml"):
        shutil.copy2(clone / name, folder / name)
    source = (clone / "freq_loss_plugin" / "engine" / "environment.py").read_text(encoding="utf-8")
    assert source.count('"--editable", f"{ROOT}[train]"') == 1
    source = source.replace('"--editable", f"{ROOT}[train]"', '"--no-index", "pip"')
    source = source.replace('"-m", "freq_loss_plugin", "train"', '"-c", "import sys; print(sys.argv[1:])"')
    (folder / "freq_loss_plugin" / "engine" / "environment.py").write_text(source, encoding="utf-8")
    return folder


def test_an_environment_without_pip_is_made_again(without_installing, tmp_path):
    """What Debian without python3-venv leaves behind."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    done = bootstrap(without_installing, venv, "--style", "weave", PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "['--style', 'weave']"
    assert "installing" not in bootstrap(without_installing, venv, PYTHON=sys.executable).stdout


def test_another_python_makes_another_environment(without_installing, tmp_path):
    venv = tmp_path / "venv"
    assert bootstrap(without_installing, venv, PYTHON=sys.executable).returncode == 0
    marker = venv / ".freq_loss_installed"
    marker.write_text("/another/python\n3.10.0", encoding="utf-8")
    (venv / "left_over").touch()
    done = bootstrap(without_installing, venv)
    assert done.returncode == 0
    assert (venv / "left_over").exists()  # without PYTHON, any environment will do
    assert "installing" in bootstrap(without_installing, venv, PYTHON=sys.executable).stdout
    assert not (venv / "left_over").exists()


def test_a_python_that_is_too_old_or_missing_is_named(without_installing, tmp_path):
    old = tmp_path / "old_python"
    program = "import sys, runpy; sys.version_info = (3, 8); runpy.run_path(sys.argv[1], run_name='__main__')"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}" "$@"\n')
    old.chmod(0o755)
    done = bootstrap(without_installing, tmp_path / "venv", PYTHON=str(old))
    assert done.returncode == 1
    assert "expected 3.10 or newer; set PYTHON to one" in done.stdout
    assert bootstrap(without_installing, tmp_path / "venv", PYTHON="/no/such/python").returncode != 0


def test_a_failing_venv_says_what_is_missing(without_installing, tmp_path):
    broken = tmp_path / "python_without_venv"
    broken.write_text(f"""#!/bin/sh
[ "$2" = venv ] && exit 1
exec {sys.executable} "$@"
""")
    broken.chmod(0o755)
    file = without_installing / "freq_loss_plugin" / "engine" / "environment.py"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("call([sys.executable", f"call([{str(broken)!r}"), encoding="utf-8")
    done = bootstrap(without_installing, tmp_path / "venv", PYTHON=sys.executable)
    assert done.returncode == 1
    assert "sudo apt install python3." in done.stdout


def test_windows_has_one_command_too(clone):
    """The batch file has not been run; what it calls is where it says, and its lines end as they must."""
    batch = (clone / "train_freq_aware.bat").read_bytes()
    assert batch.count(b"\r\n") == batch.count(b"\n") > 5
    assert b"%~dp0freq_loss_plugin\\engine\\environment.py" in batch
    assert (clone / "freq_loss_plugin" / "engine" / "environment.py").is_file()
    assert "*.bat text eol=crlf" in (clone / ".gitattributes").read_text(encoding="utf-8")
    assert environment.python_of(Path("venv"), "nt") == Path("venv/Scripts/python.exe")


@pytest.mark.long
def test_from_an_empty_folder_to_a_lora(clone, tmp_path):
    """In a new environment that can import the packages of this one, so that nothing large is downloaded."""
    venv, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    variables = environment_of(clone, venv)

    def run(*arguments):
        command = ["bash", str(clone / "train_freq_aware.sh"), *arguments]
        return subprocess.run(command, cwd=empty, env=variables, capture_output=True, text=True, timeout=600)

    done = run("--max_train_steps", "1", "--style", "frames")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"installing into {venv}")
    assert sorted(path.name for path in (empty / "output").iterdir()) == [
        "comparison.png",
        "config.toml",
        "curves.png",
        "images",
        "tiny_lora-plain_mse.safetensors",
        "tiny_lora-plain_mse.state",
        "tiny_lora.safetensors",
        "tiny_lora.state",
    ]
    assert len(list((empty / "output" / "images" / "frames" / "1_frames").glob("*.png"))) == 24
    imported = [str(venv / "bin" / "python"), "-c", "import freq_loss_plugin; print(freq_loss_plugin.__file__)"]
    printed = subprocess.run(imported, cwd=empty, env=variables, capture_output=True, text=True).stdout.strip()
    assert Path(printed) == clone / "freq_loss_plugin" / "__init__.py"
    again = run("--help")
    assert again.returncode == 0
    assert "installing" not in again.stdout
    assert "--resume" in again.stdout
