"""The shape of the tree: imports follow the arrows in ARCHITECTURE.md, and the public names are pinned."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import freq_loss_plugin

ROOT = Path(__file__).parent.parent
PACKAGES = ("freq_loss_plugin", "kohya_patch", "nodes")
HOSTS = {"library", "networks", "train_network", "musubi_tuner", "comfy", "comfy_api", "folder_paths", "server"}
# Packages that are not needed for the loss, and the only places that may import them.
HEAVY = {
    "accelerate": ["engine"],
    "diffusers": ["engine", "inspection/autoencoder.py"],
    "transformers": ["engine", "guidance_token/extract.py"],
    "peft": ["engine", "lora/kohya_format.py"],
    "matplotlib": ["analysis/figures.py", "analysis/fonts.py"],
}


def drawn_arrows() -> dict[str, set[str]]:
    """What each folder may import, by the fenced block in ARCHITECTURE.md whose lines are ``a, b -> c -> d``."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    (diagram,) = (block for block in re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if "->" in block)
    arrows: dict[str, set[str]] = {}
    for line in diagram.splitlines():
        groups = [[name.strip() for name in group.split(",")] for group in line.split("->")]
        for importers, imported in itertools.pairwise(groups):
            for name in importers:
                arrows.setdefault(name, set()).update(imported)
    return arrows


ARROWS = drawn_arrows()


def files_of(folder: str) -> list[Path]:
    return sorted((ROOT / folder if folder in PACKAGES else ROOT / "freq_loss_plugin" / folder).rglob("*.py"))


def imports(file: Path) -> Iterator[list[str]]:
    """The imports anywhere in a file, each as the parts of an absolute path: module, then name."""
    package = list(file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = node.module.split(".") if node.module else []
            yield from ([*start, *module, alias.name] for alias in node.names)


def exported_from() -> dict[str, str]:
    """The folder of each name that ``freq_loss_plugin`` exports."""
    return {parts[-1]: parts[1] for parts in imports(ROOT / "freq_loss_plugin" / "__init__.py") if parts[0] in PACKAGES}


EXPORTED_FROM = exported_from()


def folder_of(parts: list[str]) -> str | None:
    """The folder that an import leads to; None for other packages and for single modules like `atomic_files`."""
    if parts[0] != "freq_loss_plugin":
        return parts[0] if parts[0] in PACKAGES else None
    name = EXPORTED_FROM.get(parts[1], parts[1]) if len(parts) == 2 else parts[1]
    return name if (ROOT / "freq_loss_plugin" / name).is_dir() else None


def test_every_folder_is_in_the_diagram():
    inside = {path.parent.name for path in (ROOT / "freq_loss_plugin").glob("*/__init__.py")}
    assert ARROWS.keys() | set.union(*ARROWS.values()) == inside | {"kohya_patch", "nodes"}


@pytest.mark.parametrize("folder", sorted(ARROWS.keys() | set.union(*ARROWS.values())))
def test_imports_follow_the_arrows(folder):
    files = files_of(folder)
    assert files
    reached = {(folder_of(parts), file.name) for file in files for parts in imports(file)}
    others = {(target, name) for target, name in reached if target not in (None, folder)}
    forbidden = {(target, name) for target, name in others if target not in ARROWS.get(folder, set())}
    assert not forbidden, f"{folder} imports {forbidden}, and no arrow in ARCHITECTURE.md allows that"
    unused = ARROWS.get(folder, set()) - {target for target, _ in others}
    assert not unused, f"ARCHITECTURE.md draws arrows from {folder} to {unused}, and nothing is imported along them"


def test_single_modules_import_nothing_of_the_project():
    """`atomic_files` and `version` may be imported from every folder, because they import none."""
    for name in ("atomic_files.py", "version.py"):
        assert not [parts for parts in imports(ROOT / "freq_loss_plugin" / name) if parts[0] in PACKAGES], name


def test_the_package_imports_no_host_and_heavy_libraries_only_where_they_are_needed():
    package = ROOT / "freq_loss_plugin"
    for file in package.rglob("*.py"):
        names = {parts[0] for parts in imports(file)}
        assert not names & HOSTS, file
        for library in names & HEAVY.keys():
            assert any(file.is_relative_to(package / place) for place in HEAVY[library]), (file, library)


def test_the_comfyui_pack_uses_relative_imports_only():
    """ComfyUI imports the pack under its folder's name, so absolute imports of our packages would fail there."""
    files = [*(ROOT / "nodes").rglob("*.py"), *(ROOT / "freq_loss_plugin").rglob("*.py"), ROOT / "__init__.py"]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & set(PACKAGES), file
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] not in PACKAGES, file


def test_functions_and_files_are_short():
    """As CONTRIBUTING says; docstrings do not count."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout of git")
    for name in listed.stdout.split():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert text.count("\n") <= (400 if name.startswith("tests/") else 300), name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                assert not body or body[-1].end_lineno - body[0].lineno < 40, (name, node.name)


def test_the_public_names_are_pinned():
    assert sorted(freq_loss_plugin.__all__) == [
        "BandSpec",
        "Bands",
        "ConfigError",
        "FreqLossConfig",
        "FrequencyLoss",
        "LossSpec",
        "__version__",
        "frequency_decomposition",
        "frequency_matching_loss",
        "recover_latent",
        "reference_loss",
    ]


def imported_by(statement: str, *modules: str) -> set[str]:
    """Which of these modules a statement imports, in a process of its own."""
    code = f"import sys; {statement}; print(*({set(modules)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_network_module_imports_nothing_heavy():
    assert not imported_by("import kohya_patch, kohya_patch.startup", "torch", "pywt", "numpy")


def test_importing_the_package_imports_no_optional_library():
    assert imported_by("import freq_loss_plugin", "torch", "pywt", "pytorch_wavelets", *HEAVY) == {"torch"}


def test_the_changelog_begins_with_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[?(\d[^\s\]]*)", changelog, re.MULTILINE).group(1) == freq_loss_plugin.__version__
