"""README, docs and examples say what the code does."""

from __future__ import annotations

import doctest
import importlib
import re
import runpy
from pathlib import Path

import hosts
import pytest
import toml

import freq_loss_plugin
from freq_loss_plugin import FreqLossConfig
from kohya_patch.musubi import trainers as musubi
from kohya_patch.sd_scripts.trainers import FAMILIES

ROOT = Path(__file__).parent.parent
README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
MUSUBI_EXAMPLES = sorted((ROOT / "examples" / "musubi-tuner").glob("*.toml"))
DOCUMENTS = sorted(
    file.relative_to(ROOT)
    for pattern in ("*.md", "docs/*.md", "benchmarks/**/*.md", "assets/**/*.md")
    for file in ROOT.glob(pattern)
)
# What we recommend, wherever something is recommended.
RECOMMENDED = {"freq_loss_timesteps": "shared", "freq_loss_gradient_ratio": 0.1}


def test_the_tables_of_options_are_generated():
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    tables = 0
    for file in (ROOT / "docs").glob("*.md"):
        text = file.read_text(encoding="utf-8")
        tables += len(generate["GENERATED"].findall(text))
        assert generate["generated"](text) == text, f"{file.name}: run {generate['COMMAND']}"
    assert tables == 3


def documented_modules():
    """The modules with examples in their docstrings."""
    package = Path(freq_loss_plugin.__file__).parent
    for file in sorted(package.rglob("*.py")):
        if ">>> " in file.read_text(encoding="utf-8"):
            yield ".".join(file.relative_to(package.parent).with_suffix("").parts)


@pytest.mark.parametrize("module", sorted(documented_modules()))
def test_examples_in_docstrings_run(module):
    import torch

    names = {"torch": torch} | {name: getattr(freq_loss_plugin, name) for name in freq_loss_plugin.__all__}
    result = doctest.testmod(importlib.import_module(module), extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0


def modules_of(examples):
    """The network modules that examples say they replace."""
    return [
        module
        for example in examples
        for module in re.findall(r'# was "([\w.]+)"', example.read_text(encoding="utf-8"))
    ]


def test_there_is_an_example_for_every_family():
    assert set(modules_of(EXAMPLES)) == {family.network_module for family in FAMILIES.values()}
    defined = [family for family in musubi.FAMILIES.values() if not family.undefined]
    assert sorted(modules_of(MUSUBI_EXAMPLES)) == sorted(family.network_module for family in defined)


@pytest.mark.parametrize("example", [*EXAMPLES, *MUSUBI_EXAMPLES], ids=lambda path: path.stem)
def test_every_example_has_the_recommended_options(example):
    config = toml.load(example)
    assert config["training"]["network_module"] == "kohya_patch"
    assert config["freq_loss"] == RECOMMENDED
    flat = {key: value for section in config.values() for key, value in section.items()}
    assert FreqLossConfig.from_mapping(flat).enabled


def test_the_documents_recommend_the_same():
    for document in ("README.md", "README.zh.md", "docs/options.md", "install.py"):
        first = re.search(
            r"\[freq_loss\]\n(.*?)(?:```|\"{3})", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL
        )
        assert toml.loads(first.group(1)) == RECOMMENDED, document


def test_the_sd15_example_keeps_the_values_of_the_original_description():
    config = toml.load(ROOT / "examples" / "sd15.toml")
    assert config["training"]["network_dim"] == 4
    assert config["data"]["resolution"] == "512,512"
    assert config["data"]["train_batch_size"] == 4
    assert config["training"]["min_snr_gamma"] == 5.0


@pytest.mark.sd_scripts
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_use_no_key_that_their_trainer_does_not_know(example, monkeypatch):
    checkout = hosts.sd_scripts()
    monkeypatch.syspath_prepend(str(checkout))
    text = example.read_text(encoding="utf-8")
    script = re.search(r"accelerate launch (\w+)\.py", text).group(1)
    if not (checkout / f"{script}.py").is_file():
        pytest.skip(f"{hosts.SD_SCRIPTS.title(checkout)} has no {script}.py")
    known = vars(importlib.import_module(script).setup_parser().parse_args([])).keys()
    for section in toml.loads(text).values():
        assert section.keys() <= known | FreqLossConfig.fields_by_key().keys()


@pytest.mark.musubi_tuner
@pytest.mark.versions
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("example", MUSUBI_EXAMPLES, ids=lambda path: path.stem)
def test_examples_for_musubi_tuner_use_no_key_that_their_trainer_does_not_know(example, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "musubi_host"))
    import musubi_stand_ins

    text = example.read_text(encoding="utf-8")
    script = re.search(r"accelerate launch src/musubi_tuner/(\w+)\.py", text).group(1)
    (name,) = (name for name, (own, *_) in musubi_stand_ins.TRAINERS.items() if own == script)
    known = vars(musubi_stand_ins.parse(name)).keys()
    values = toml.loads(text)
    for section in values.values():
        assert section.keys() <= known | FreqLossConfig.fields_by_key().keys()
    flat = {key: value for section in values.values() for key, value in section.items() if key in known}
    musubi_stand_ins.parse(name, **flat)  # choices are checked


def targets(text):
    """The targets of links and images; those of headings alone as ``#``."""
    return ["#" if target.startswith("#") else target for target in re.findall(r"\]\(([^)]+)\)", text)]


def test_the_chinese_readme_keeps_step():
    """The same headings by level, code, tables, images, links, and figures in the same sections."""
    sections = [re.split(r"^##+ .*\n", text, flags=re.MULTILINE) for text in (README, CHINESE)]
    assert len(sections[0]) == len(sections[1])
    other_language = {"README.zh.md": "README.md"}
    for english, chinese in zip(*sections, strict=True):
        assert re.findall(r"(?ms)^```.*?^```", english) == re.findall(r"(?ms)^```.*?^```", chinese)
        columns = [[line.count("|") for line in text.splitlines() if line[:1] == "|"] for text in (english, chinese)]
        assert columns[0] == columns[1]
        assert [other_language.get(target, target) for target in targets(english)] == targets(chinese)
        # Every figure of the one is in the other; how often it is repeated is a matter of style.
        figures = [set(re.findall(r"\d+(?:\.\d+)?", text)) for text in (english, chinese)]
        assert figures[0] == figures[1]


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    anchors = {file: headings(file) for file in {document, *linked_documents(document, text)}}
    for target in re.findall(r"(?:\]\(|src=\")([^)\"]+)", text):
        file, _, anchor = target.partition("#")
        if ":" in target or file.startswith("../../actions"):  # GitHub's own pages
            continue
        path = (ROOT / document.parent / file).resolve().relative_to(ROOT) if file else document
        assert (ROOT / path).exists(), target
        if anchor:
            assert anchor in anchors[path], target


@pytest.mark.parametrize("document", [file for file in DOCUMENTS if file.name != "CHANGELOG.md"], ids=str)
def test_named_files_exist(document):
    """Python files that a document names without a link."""
    known = {file.name for folder in ("", "*", "*/*") for file in ROOT.glob(f"{folder}/*.py".lstrip("/"))}
    named = re.findall(r"`(?:[\w./]*/)?(test_\w+\.py|[a-z]\w+\.py)`", (ROOT / document).read_text(encoding="utf-8"))
    of_the_host = {"train_network.py", "train_leco.py"}
    assert not {name for name in named if name not in known | of_the_host and "_train_" not in name}


def linked_documents(document, text):
    for file in re.findall(r"\]\(([^)#:]+\.md)#", text):
        yield (ROOT / document.parent / file).resolve().relative_to(ROOT)


def headings(document):
    """The anchors that GitHub makes of a document's headings."""
    found = re.findall(r"^#+ (.*)", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}
