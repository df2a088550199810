"""The rows of clex_local/architectures.py agree with each other, and with what the documents say of them.

`python tests/test_architecture_list.py` writes the documents anew.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from clex_convert.model_classes import MODEL_CLASSES
from clex_local.architectures import ARCHITECTURES, families, find, of_class, table, trainable_classes, with_tables

pytestmark = [pytest.mark.docs, pytest.mark.convert]

ROOT = Path(__file__).parent.parent


def summary() -> str:
    """Two items of a list for the README."""
    items = (
        f"Tables by length: {families()} ([which classes, and what was compared](docs/architectures.md)).",
        f"A CLEX layer of its own (`clex-train`): {families(trained=True)}.",
    )
    return "\n".join(textwrap.fill(f"* {item}", 120, subsequent_indent="  ", break_on_hyphens=False) for item in items)


DOCUMENTS = {"README.md": summary, "docs/architectures.md": table}


def written(name: str) -> str:
    start, end = "<!-- architectures -->\n", "<!-- end of architectures -->"
    text, pattern = (ROOT / name).read_text(encoding="utf-8"), f"{start}.*?{end}"
    text, count = re.subn(pattern, lambda _: f"{start}{DOCUMENTS[name]()}\n{end}", text, flags=re.DOTALL)
    assert count == 1, f"{name} has no place for the list of architectures"
    return text


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_list_the_architectures_there_are(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert written(name) == text, "run python tests/test_architecture_list.py"


def test_each_class_that_is_named_has_its_entry_and_each_entry_is_named():
    classes = [name for row in with_tables() for name in row.classes]
    assert sorted(classes) == sorted(MODEL_CLASSES)
    assert set(trainable_classes()) <= set(classes)
    assert all(name in of_class(name).classes for name in classes)


def test_each_architecture_has_one_row_which_says_what_it_is():
    assert all(row.models for row in with_tables())
    assert not any(row.classes or row.trainable for row in ARCHITECTURES.values() if not row.tables)
    assert [row.name for row in ARCHITECTURES.values()] == list(ARCHITECTURES)


@pytest.mark.parametrize("name", ["bert", "", None, 3, ["llama"]])
def test_what_has_no_row_has_no_tables(name):
    assert not find(name).tables


def test_the_list_is_printed_without_torch_or_the_converter():
    code = "import runpy, sys; runpy.run_module('clex_local.architectures', run_name='__main__'); "
    code += "sys.exit(any(name.startswith(('torch', 'clex_convert')) for name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == table()


if __name__ == "__main__":
    for document in DOCUMENTS:
        (ROOT / document).write_text(written(document), encoding="utf-8")
