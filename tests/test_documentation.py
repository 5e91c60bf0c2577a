"""README, examples and docstrings say what the code does."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import re
from pathlib import Path

import hosts
import pytest
import toml

from freq_loss_plugin import FreqLossConfig
from freq_loss_plugin.engine.settings import Settings
from kohya_patch.trainers import FAMILIES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))


def test_the_table_of_options_is_complete_and_its_defaults_are_right():
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", README, re.MULTILINE))
    defaults = {option.name: option.default for option in dataclasses.fields(FreqLossConfig)}
    keys = {key: name for key, name in FreqLossConfig.fields_by_key().items() if key != "min_snr_gamma"}
    assert rows.keys() == keys.keys()
    for key, shown in rows.items():
        default = defaults[keys[key]]
        as_toml = toml.dumps({"x": default}).strip().removeprefix("x = ") if default is not None else "as the trainer"
        assert shown == as_toml


def test_every_choice_is_named_in_the_table():
    for option in dataclasses.fields(FreqLossConfig):
        for choice in option.metadata["choices"] or ():
            assert f"`{choice}`" in README


def test_the_keys_of_the_engine_are_all_named():
    (listed,) = re.findall(r"knows the keys\n\n((?:> .*\n)+)", README)
    named = re.findall(r"`(\w+)`", listed)
    assert sorted(named) == sorted(each.name for each in dataclasses.fields(Settings))


@pytest.mark.parametrize("module", ["bands", "latents", "loss", "config", "spectra"])
def test_examples_in_docstrings_run(module):
    import torch

    loaded = importlib.import_module(f"freq_loss_plugin.{module}")
    result = doctest.testmod(loaded, extraglobs={"torch": torch})
    assert result.failed == 0


def test_there_is_an_example_for_every_family():
    modules = {
        line for example in EXAMPLES for line in re.findall(r'# was "([\w.]+)"', example.read_text(encoding="utf-8"))
    }
    assert modules == {family.network_module for family in FAMILIES.values()}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(example):
    config = toml.load(example)
    assert config["training"]["network_module"] == "kohya_patch"
    flat = {key: value for section in config.values() for key, value in section.items()}
    assert FreqLossConfig.from_mapping(flat).enabled


def test_the_sd15_example_has_the_values_of_the_first_description():
    config = toml.load(ROOT / "examples" / "sd15.toml")
    assert config["training"]["network_dim"] == 4
    assert config["data"]["resolution"] == "512,512"
    assert config["data"]["train_batch_size"] == 4
    assert config["training"]["min_snr_gamma"] == 5.0
    assert FreqLossConfig.from_mapping({"freq_loss": config["freq_loss"]}) == FreqLossConfig()


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


def blocks(text):
    """The code blocks of a document, fenced or indented, without the words beside names in the picture of the tree."""
    found = re.findall(r"(?ms)^```\w*\n(.*?)^```|((?:^    [^\n]*\n|^\n(?=    ))+)", text)
    return [re.sub(r"(?m)^(\s*[\w./,-]+(?: [\w/.-]+)?)  +.*$", r"\1", "".join(each)).strip("\n") for each in found]


def test_the_chinese_readme_keeps_step():
    """Headings by their levels, code, tables, pictures, links and figures; what it says about them is prose."""
    chinese = (ROOT / "README.zh.md").read_text(encoding="utf-8")
    english = README
    assert [len(each) for each in re.findall(r"^(#+) ", chinese, re.M)] == [
        len(each) for each in re.findall(r"^(#+) ", english, re.M)
    ]
    assert blocks(chinese) == blocks(english)
    rows = [[line.count("|") for line in text.splitlines() if line.startswith("|")] for text in (chinese, english)]
    assert rows[0] == rows[1]
    targets = [re.findall(r"\]\(([^)]+)\)", text) for text in (chinese, english)]
    # A heading's anchor is made of its words; the table of contents is the same, the words are not.
    for text in (chinese, english):
        words = (heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)", text, re.M))
        anchors = ["#" + re.sub(r"[^\w-]", "", each) for each in words]
        assert all(link in anchors for link in re.findall(r"\]\((#[^)]+)\)", text))
    same = {"README.md": "README.zh.md"}
    compared = [["#" if each[0] == "#" else each for each in found] for found in targets]
    assert [same.get(each, each) for each in compared[0]] == compared[1]
    options = [re.findall(r"^\| (`\w+`) \| (`[^`]*`) \|", text, re.M) for text in (chinese, english)]
    assert options[0] == options[1]
    figures = [sorted(re.findall(r"\d+(?:\.\d+)?", text)) for text in (chinese, english)]
    assert figures[0] == figures[1]


def test_links_between_the_documents_lead_somewhere():
    for document in ("README.md", "README.zh.md", "ARCHITECTURE.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / target).exists(), (document, target)
