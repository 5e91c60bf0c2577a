"""The pack around the nodes: installation, texts in four languages, and what the server delivers."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import hosts
import pytest
import toml
import torch

from freq_loss_plugin import __version__

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS / "comfyui_host"))

import node_texts  # noqa: E402

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
BIN = Path(sys.executable).parent
SPLIT = (
    "FreqLoss_BandSplit",
    {
        "samples": {"samples": torch.randn(1, 4, 8, 8)},
        "method": "wavelet",
        "wavelet": "db3",
        "levels": 2,
        "cutoff": 0.25,
    },
)
PREVIEW = (
    "FreqLoss_BandPreview",
    {**SPLIT[1], "source": SPLIT[1]["samples"], "latent_format": "auto", "frame": 0, "panel_size": 64},
)
del PREVIEW[1]["samples"]


# -- texts -------------------------------------------------------------------------------------------------------------


def keys(value):
    return {key: keys(inner) for key, inner in value.items()} if isinstance(value, dict) else None


@pytest.mark.parametrize("language", node_texts.LANGUAGES)
def test_every_language_has_every_text(language):
    texts = node_texts.texts(language)
    assert keys(texts) == keys(node_texts.texts("en"))
    assert keys(node_texts.texts(language, "main")) == keys(node_texts.texts("en", "main"))
    for node in texts.values():
        for text in (node["display_name"], node["description"]):
            assert text.strip()
        for entry in (*node["inputs"].values(), *node["outputs"].values()):
            assert entry["name"].strip()
            assert entry["tooltip"].strip()
            # A bar would end a cell of the help page's table; braces and @ are commands of the translation library.
            assert not set("|{}@") & set(entry["name"] + entry["tooltip"])


@pytest.mark.parametrize("language", [language for language in node_texts.LANGUAGES if language != "en"])
def test_translations_are_translated(language):
    english, texts = node_texts.texts("en"), node_texts.texts(language)
    for node, translated in texts.items():
        assert translated["description"] != english[node]["description"]
        for kind in ("inputs", "outputs"):
            for key, entry in translated[kind].items():
                assert entry["tooltip"] != english[node][kind][key]["tooltip"], (node, key)


@pytest.mark.parametrize("language", node_texts.LANGUAGES)
def test_every_node_has_a_help_page_whose_tables_are_its_texts(language):
    texts = node_texts.texts(language)
    assert {path.name for path in (ROOT / "web" / "docs").iterdir()} == texts.keys()
    for node, words in texts.items():
        page = node_texts.page(node, language).read_text(encoding="utf-8")
        assert page == node_texts.with_table(page, words, language), (
            f"run python tests/comfyui_host/node_texts.py with ComfyUI's address: {node}, {language}"
        )
        assert page.startswith(f"# {words['display_name']}\n")


# What help pages write as code beside names of inputs and outputs.
OTHER_CODE = {"mean", ".safetensors", "guidance_token", "max_token_length"}
OTHER_CODE |= {"cfg", "start_percent", "end_percent"}  # of core's nodes
OTHER_CODE |= {'freq_loss_image_quality = "auto"', "python -m freq_loss_plugin inspect"}


@pytest.mark.parametrize("language", node_texts.LANGUAGES)
def test_names_in_help_pages_are_names_of_nodes(language):
    texts = node_texts.texts(language)
    names = {node["display_name"] for node in texts.values()}
    shown = {
        entry["name"] for node in texts.values() for kind in ("inputs", "outputs") for entry in node[kind].values()
    }
    for node in texts:
        page = node_texts.page(node, language).read_text(encoding="utf-8")
        prose = page.split("\n## ")[0]
        for code in re.findall(r"`([^`]+)`", prose):
            assert code in shown | OTHER_CODE, (node, code)
        # Other words are bold, too; what looks like the name of a node must be one.
        for bold in re.findall(r"\*\*([^*]+)\*\*", prose):
            assert bold in names or not difflib.get_close_matches(bold, names, cutoff=0.7), (node, bold)


@pytest.mark.comfyui
def test_the_english_texts_are_those_of_the_nodes(comfyui_server):
    assert node_texts.texts("en") == node_texts.english(comfyui_server.get("/object_info"))


# -- the registry ------------------------------------------------------------------------------------------------------


def test_the_registry_finds_everything_it_asks_for():
    config = toml.load(ROOT / "pyproject.toml")
    project, comfy = config["project"], config["tool"]["comfy"]
    assert "comfyui" not in project["name"].lower()
    assert len(project["name"]) < 100
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    assert comfy["requires-comfyui"] == ">=0.3.64"
    assert any(classifier.startswith("Operating System ::") for classifier in project["classifiers"])
    version = (ROOT / comfy["version"]["path"]).read_text(encoding="utf-8")
    assert f'__version__ = "{__version__}"' in version
    for entry, size in (("Icon", (400, 400)), ("Banner", (1260, 540))):
        from PIL import Image

        address = urllib.parse.urlparse(comfy[entry])
        assert address.scheme == "https"
        file = ROOT / "assets" / Path(address.path).name
        with Image.open(file) as image:
            assert image.size == size


def test_requirements_are_few_without_bounds_and_without_what_breaks_environments():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["pytorch_wavelets", "PyWavelets", "matplotlib"]
    dependencies = toml.load(ROOT / "pyproject.toml")["project"]["dependencies"]
    assert not {"torch", "numpy"} & set(dependencies)


def test_comfy_test_lint_passes():
    done = subprocess.run([str(BIN / "comfy-test"), "lint", str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[SYNTAX] PASSED" in done.stdout


# -- installation and import -------------------------------------------------------------------------------------------


def called(folder, *calls, comfyui=None, **environment):
    """What nodes return in a ComfyUI whose custom nodes are in ``folder``."""
    file = folder / "calls.pt"
    torch.save(list(calls), file)
    command = [sys.executable, str(TESTS / "comfyui_host" / "execute.py"), str(comfyui or hosts.comfyui()), str(folder)]
    done = subprocess.run(
        command, input=f"{file}\n", env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(file), done.stderr


def linked(folder):
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "freq_loss_plugin").symlink_to(ROOT, target_is_directory=True)
    return folder


def commit_tree_to(source):
    """This work tree, without tests and weights, as a git repository of one commit."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith(("tests/", "assets/tiny_sd/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    author = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=source, check=True)


@pytest.mark.comfyui
@pytest.mark.long
def test_the_managers_command_line_installs_it_from_a_git_address(tmp_path):
    """Into a copy of ComfyUI; the address is mapped to a folder by git's own configuration."""
    comfyui = hosts.comfyui()
    if importlib.util.find_spec("cm_cli") is None:
        pytest.skip("no ComfyUI Manager: pip install comfyui-manager; run tests/run.sh")
    left_out = {".git", "tests", "tests-unit", "models", "output"}
    copy = shutil.copytree(
        comfyui,
        tmp_path / "ComfyUI",
        ignore=lambda folder, names: left_out & set(names) if Path(folder) == comfyui else {"__pycache__"},
    )
    commit_tree_to(tmp_path / "git" / "some-other-name")
    settings = tmp_path / "gitconfig"
    settings.write_text(f'[url "file://{tmp_path}/git/"]\n\tinsteadOf = https://git.example/\n')
    environment = {**os.environ, "COMFYUI_PATH": str(copy), "GIT_CONFIG_GLOBAL": str(settings)}
    done = subprocess.run(
        [str(BIN / "cm-cli"), "install", "https://git.example/some-other-name"],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    installed = copy / "custom_nodes" / "some-other-name"
    assert (installed / "nodes" / "__init__.py").is_file(), done.stdout + done.stderr
    assert "EXECUTE => [" in done.stdout.replace("\n", " ")
    assert "install.py" in done.stdout
    assert "could not be installed" not in done.stdout
    # The name with a hyphen stays; only the driver asks for the pack under the usual one.
    (copy / "custom_nodes" / "freq_loss_plugin").symlink_to(installed)
    ((low, high, _),), _ = called(copy, SPLIT, comfyui=copy)
    torch.testing.assert_close(low["samples"] + high["samples"], SPLIT[1]["samples"]["samples"])


@pytest.mark.comfyui
def test_without_its_packages_the_pack_works_in_part_and_names_the_missing_ones(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nfor name in ('matplotlib', 'pytorch_wavelets'): sys.modules[name] = None\n"
    )
    results, log = called(linked(tmp_path), SPLIT, PREVIEW, PYTHONPATH=str(tmp_path))
    (low, high, strip), refused = results
    torch.testing.assert_close(low["samples"] + high["samples"], SPLIT[1]["samples"]["samples"])
    assert strip.shape == (1, 8, 24, 3)
    assert refused.startswith("ImportError: plots need matplotlib, which cannot be imported")
    assert refused.endswith("pip install matplotlib")
    (warning,) = [line for line in log.splitlines() if "no wavelet bands, fft bands are used" in line]
    assert "pip install pytorch_wavelets PyWavelets" in warning


def in_comfyui(folder, code):
    """The lines that code prints in a Python that has imported ComfyUI and can ``load_the_pack``."""
    pack = linked(folder) / "custom_nodes" / "freq_loss_plugin"
    start = f"""
import asyncio, sys
sys.path.insert(0, {str(hosts.comfyui())!r})
sys.argv = ["x", "--cpu", "--base-directory", {str(folder)!r}]
import comfy.options
comfy.options.enable_args_parsing()
import nodes, comfy.samplers
def load_the_pack(): return asyncio.run(nodes.load_custom_node({str(pack)!r}))
"""
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.comfyui
def test_importing_the_pack_brings_in_nothing_heavy_and_changes_nothing(tmp_path):
    code = f"""
import os, socket
before, files = set(sys.modules), sorted(os.listdir({str(tmp_path)!r}))
def refuse(*_): raise AssertionError("the network")
socket.socket.connect = refuse
assert load_the_pack()
assert sorted(os.listdir({str(tmp_path)!r})) == files
print(sorted({{name.split(".")[0] for name in set(sys.modules) - before}}))
"""
    imported = set(json.loads(in_comfyui(tmp_path, code)[-1].replace("'", '"')))
    assert not imported & {"matplotlib", "diffusers", "peft", "accelerate", "transformers", "kohya_patch", "toml"}


@pytest.mark.comfyui
def test_keywords_of_newer_cores_are_passed_on_where_known_and_others_are_mistakes(tmp_path):
    code = """
import dataclasses
from comfy_api.latest import io
known = "search_aliases" in {field.name for field in dataclasses.fields(io.Schema)}
@dataclasses.dataclass
class Newer(io.Schema):
    search_aliases: list = None
io.Schema = Newer
class Float(io.Float.Input):
    def __init__(self, *arguments, advanced=None, **named):
        super().__init__(*arguments, **named)
        self.advanced = advanced
io.Float.Input = Float
assert load_the_pack()
node = nodes.NODE_CLASS_MAPPINGS["FreqLoss_BandSplit"]
schema = node.define_schema()
print(known, schema.search_aliases, [entry.advanced for entry in schema.inputs if entry.id == "cutoff"])
module = sys.modules[type(schema).__module__] and sys.modules[node.__module__.rsplit(".", 1)[0] + ".schema"]
try:
    module.schema(node_id="x", catgory="y")
except TypeError as error:
    print(error)
"""
    passed, mistake = in_comfyui(tmp_path, code)[-2:]
    assert passed.split(" ", 1)[1] == "['wavelet', 'fft', 'low pass', 'high pass', 'frequency separation'] [True]"
    assert "catgory" in mistake


@pytest.mark.comfyui
def test_the_server_loads_the_pack_without_complaint(comfyui_server):
    log = comfyui_server.log.read_text()
    assert "IMPORT FAILED" not in log
    assert "Unable to parse pyproject.toml" not in log
    assert "freq_loss_plugin" in log


# -- what the server delivers ------------------------------------------------------------------------------------------


@pytest.mark.comfyui
@pytest.mark.parametrize("language", node_texts.LANGUAGES)
def test_help_pages_and_translations_are_served(comfyui_server, language):
    from server import PACK_NAME

    assert comfyui_server.get("/i18n")[language]["nodeDefs"] == node_texts.texts(language)
    for node in node_texts.texts(language):
        served = comfyui_server.read(f"/extensions/{PACK_NAME}/docs/{node}/{language}.md")
        assert served == node_texts.page(node, language).read_bytes()


@pytest.mark.comfyui
def test_workflows_are_served_as_templates(comfyui_server):
    from server import PACK_NAME

    assert sorted(comfyui_server.get("/workflow_templates")[PACK_NAME]) == [file.stem for file in WORKFLOWS]
    for file in WORKFLOWS:
        for ending in (".json", ".jpg"):
            address = f"/api/workflow_templates/{PACK_NAME}/{file.stem}{ending}"
            assert comfyui_server.read(address) == file.with_suffix(ending).read_bytes()
