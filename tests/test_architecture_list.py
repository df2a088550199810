"""The rows of clex_local/model_file/architectures.py agree with each other, and with what the documents say of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from clex_convert.model_classes import MODEL_CLASSES
from clex_local.model_file.architectures import ARCHITECTURES, find, of_class, table, trainable_classes, with_tables
from docs import generate

pytestmark = [pytest.mark.docs, pytest.mark.convert]


@pytest.mark.parametrize("page", [generate.README, generate.ARCHITECTURES], ids=lambda page: page.name)
def test_documents_list_the_architectures_there_are(page):
    text = page.read_text(encoding="utf-8")
    assert len(generate.LIST.findall(text)) == 1
    assert generate.PAGES[page]() == text, "run make docs"


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
    code = "import runpy, sys; runpy.run_module('clex_local.model_file.architectures', run_name='__main__'); "
    code += "sys.exit(any(name.startswith(('torch', 'clex_convert')) for name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == table()
