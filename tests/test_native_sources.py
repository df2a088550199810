"""The files of native/: all in its README, and includes that go one way."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

pytestmark = [pytest.mark.native, pytest.mark.docs]

NATIVE = Path(__file__).parent.parent / "native"
FILES = sorted(p for p in (NATIVE / "src").rglob("*") if p.is_file())
ROWS = re.findall(r"^\| `((?:src|patches)/[^`]+)` \|", (NATIVE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("folder", ["src", "patches"])
def test_readme_has_one_row_for_each_file(folder: str) -> None:
    rows = [row for row in ROWS if row.startswith(folder)]
    matched = [path for row in rows for path in sorted(NATIVE.glob(row))]
    assert sorted(matched) == sorted(p for p in (NATIVE / folder).rglob("*") if p.is_file())
    assert all(list(NATIVE.glob(row)) for row in rows)


def test_includes_have_no_circle() -> None:
    """Of files: a header, and the source of the same name, which are one."""
    includes: dict[str, set[str]] = {}
    for path in FILES:
        names = re.findall(
            r'^#include "((?:ggml|llama)-clex[\w.-]*)\.h"', path.read_text(encoding="utf-8"), re.MULTILINE
        )
        includes.setdefault(path.stem, set()).update(set(names) - {path.stem})
    assert includes["llama-clex-cache"] >= {"llama-clex-tables"}  # found at all
    assert len([*TopologicalSorter(includes).static_order()]) >= len(includes)


def test_tables_and_the_runtime_on_cpus_do_not_know_each_other() -> None:
    cpu = {p.name for p in FILES if p.parent.name == "cpu"}
    for path in FILES:
        names = set(re.findall(r'^#include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE))
        others = {name for name in names if name.startswith("llama")} if path.name in cpu else names & cpu
        assert not others, path.name
