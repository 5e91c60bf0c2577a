"""Names and tooltips of the nodes as ComfyUI's translation files, and the tables of the help pages made from them.

    python node_texts.py ADDRESS      with ComfyUI running there: writes locales/en, and the tables of every help page

English texts are in the nodes themselves. The other languages are translated by hand in ``locales/LANGUAGE``, and the
tables at the end of the help pages are generated from these files.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LANGUAGES = ("en", "ja", "zh", "ko")
PREFIX = "FreqLoss_"


def english(object_info: dict[str, Any]) -> dict[str, Any]:
    """``nodeDefs.json`` in English, from a server's ``/object_info``."""
    return {
        node: {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": {
                name: {"name": name, "tooltip": options["tooltip"]}
                for kind in ("required", "optional")
                for name, (_, options) in info["input"].get(kind, {}).items()
            },
            "outputs": {
                str(number): {"name": name, "tooltip": tooltip}
                for number, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
            },
        }
        for node, info in sorted(object_info.items())
        if node.startswith(PREFIX)
    }


def texts(language: str, file: str = "nodeDefs") -> dict[str, Any]:
    """The texts of a language."""
    return json.loads((ROOT / "locales" / language / f"{file}.json").read_text(encoding="utf-8"))


def headings(language: str) -> dict[str, str]:
    """The translations of inputs, outputs, name and meaning."""
    return texts(language, "main")["FreqLoss"]


def table(texts_of_node: dict[str, Any], language: str) -> str:
    """The tables of inputs and outputs at the end of a node's help page."""
    words, parts = headings(language), []
    for kind in ("inputs", "outputs"):
        lines = [f"## {words[kind]}", "", f"| {words['name']} | {words['meaning']} |", "|---|---|"]
        lines += [f"| {entry['name']} | {entry['tooltip']} |" for entry in texts_of_node[kind].values()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def page(node: str, language: str) -> Path:
    """The help page of a node."""
    return ROOT / "web" / "docs" / node / f"{language}.md"


def with_table(text: str, texts_of_node: dict[str, Any], language: str) -> str:
    """A help page with its tables regenerated."""
    prose = text.split(f"## {headings(language)['inputs']}")[0].rstrip("\n")
    return f"{prose}\n\n{table(texts_of_node, language)}"


def main() -> None:
    with urllib.request.urlopen(f"{sys.argv[1]}/object_info") as answer:
        english_texts = english(json.load(answer))
    if not english_texts:
        sys.exit("this server has not loaded the pack")
    file = ROOT / "locales" / "en" / "nodeDefs.json"
    file.write_text(json.dumps(english_texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for language in LANGUAGES:
        for node, texts_of_node in texts(language).items():
            help_page = page(node, language)
            text = with_table(help_page.read_text(encoding="utf-8"), texts_of_node, language)
            help_page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
