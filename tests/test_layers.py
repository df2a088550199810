"""Packages of the runtime import in one direction, which docs/architecture.md says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parent.parent
PACKAGES = [path.parent.name for path in (ROOT / "clex_local").glob("*/__init__.py") if path.parent.name[0] != "_"]


def order() -> list[str]:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return re.findall(r"`(\w+)`", page.partition("modules beside them:")[2].partition("\n\n")[0])


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at whatever place in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_the_page_names_every_package():
    assert sorted(order()) == sorted(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_those_before_it(package):
    later = set(order()[order().index(package) + 1 :])
    for path in (ROOT / "clex_local" / package).glob("*.py"):
        names = [name.split(".") for name in imported(path)]
        assert not [name for name in names if name[0] == "clex_local" and set(name[1:2]) & later], path
        assert not {name[0] for name in names} & {"torch", "transformers", "clex_eval", "clex_train"}, path
