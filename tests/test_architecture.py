"""The tree keeps its shape: imports point inward, the public names are pinned, and version and changelog agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import freq_loss_plugin

ROOT = Path(__file__).parent.parent
# The ComfyUI pack is imported under its folder's name: inside it, only relative imports work.
ALLOWED = {
    "freq_loss_plugin": {"freq_loss_plugin"},
    "kohya_patch": {"kohya_patch", "freq_loss_plugin"},
    "nodes": set(),
}
OURS = {"freq_loss_plugin", "kohya_patch", "nodes", "tests"}
HOSTS = {"library", "networks", "train_network", "comfy", "comfy_api", "folder_paths", "server"}
# What the engine is built on, and only the engine.
ENGINES = {"accelerate", "diffusers", "transformers", "peft"}


def imported(file: Path) -> set[str]:
    """Top-level names of the absolute imports anywhere in ``file``."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_inward(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert imported(file) & OURS <= ALLOWED[package], file
        if package == "freq_loss_plugin":
            assert not imported(file) & HOSTS, file
            assert "engine" in file.parts or not imported(file) & ENGINES, file
            assert file.name == "drawing.py" or "matplotlib" not in imported(file), file


def test_the_pack_reaches_the_method_and_nothing_else_of_the_project():
    """Relative imports of nodes/ lead to nodes/ or, one level up, to modules of freq_loss_plugin."""
    files = [*(ROOT / "nodes").glob("*.py"), ROOT / "__init__.py"]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                assert file.parent.name == "nodes"
                package, module = node.module.split(".")
                assert package == "freq_loss_plugin"
                assert (ROOT / package / f"{module}.py").is_file(), (file, node.module)
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                for module in [node.module] if node.module else [each.name for each in node.names]:
                    assert (file.parent / f"{module}.py").is_file() or module == "nodes"


def test_nothing_imports_the_engine():
    """It stands on the method; the method does not know it. `__main__` imports it by name, when it is asked for."""
    for package in ALLOWED:
        for file in (ROOT / package).rglob("*.py"):
            inside = "engine" in file.relative_to(ROOT).parts
            assert inside or not re.search(r"^\s*from \S*engine|^\s*from \.+ import engine", file.read_text(), re.M), (
                file
            )


def test_public_names():
    assert sorted(freq_loss_plugin.__all__) == [
        "Bands",
        "ConfigError",
        "FreqLossConfig",
        "FrequencyLoss",
        "__version__",
        "frequency_decomposition",
        "frequency_matching_loss",
        "recover_latent",
        "reference_loss",
    ]
    for name in freq_loss_plugin.__all__:
        assert getattr(freq_loss_plugin, name).__doc__


def test_importing_the_network_module_imports_nothing_heavy():
    code = "import sys, kohya_patch, kohya_patch.startup; print(sorted({'torch', 'pywt', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_importing_the_method_imports_no_optional_package():
    code = "import sys, freq_loss_plugin; print(sorted({'pywt', 'pytorch_wavelets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_changelog_begins_with_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE).group(1) == freq_loss_plugin.__version__
