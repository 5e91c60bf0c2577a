"""Writes the tables of options in this folder, from the fields of the dataclasses that are named in their markers.

Where a marker names a function, the table is what that returns.

python docs/generate.py
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from freq_loss_plugin.options.reference import markdown_table  # noqa: E402

COMMAND = "python docs/generate.py"
GENERATED = re.compile(
    rf"(<!-- generated from ([\w.]+)\.(\w+) by: {re.escape(COMMAND)} -->\n).*?(<!-- end -->)", re.DOTALL
)


def generated(text: str) -> str:
    """A document with its tables as they should be."""
    return GENERATED.sub(lambda found: f"{found[1]}\n{_table(found[2], found[3])}\n{found[4]}", text)


def _table(module: str, name: str) -> str:
    named = getattr(importlib.import_module(module), name)
    return markdown_table(named) if isinstance(named, type) else named()


def main() -> None:
    """Write all documents whose tables have changed."""
    for file in sorted(DOCS.glob("*.md")):
        text = file.read_text(encoding="utf-8")
        if generated(text) != text:
            file.write_text(generated(text), encoding="utf-8")
            print(f"wrote {file.name}")


if __name__ == "__main__":
    main()
