"""docs/environment.md lists the environment variables that the sources read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parent.parent
PYTHON = ("clex_local/**/*.py", "convert/**/*.py", "evaluation/**/*.py", "train/**/*.py", "startup/*.py", "native/*.py")
TESTS = ("tests/conftest.py", "tests/helpers/*.py")
NATIVE = ("native/src/**/*.cpp", "native/src/**/*.h", "native/patches/*.patch")
OURS = re.compile(r'"((?:CLEX|GGML_CLEX|LLAMA_CLEX)_[A-Z_]+|LLAMA_CPP_LIB_PATH)"')
ADDED_GETENV = re.compile(r'^\+?[^-].*getenv\("(\w+)"\)', re.MULTILINE)


def found() -> dict[str, set[str]]:
    """The files that read each variable."""
    readers: dict[str, set[str]] = {}
    for path in (
        path for pattern in (*PYTHON, *TESTS, *NATIVE) for path in ROOT.glob(pattern) if "_llama_cpp" not in path.parts
    ):
        text = path.read_text(encoding="utf-8")
        names = ADDED_GETENV.findall(text) if path.suffix in (".patch", ".cpp", ".h") else OURS.findall(text)
        for name in names:
            readers.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    return readers


def listed() -> dict[str, set[str]]:
    rows = [
        line.split("|") for line in (ROOT / "docs" / "environment.md").read_text().splitlines() if "| `" in line[:3]
    ]
    return {row[1].strip(" `"): set(re.findall(r"`([^`]+)`", row[4])) for row in rows}


def test_every_variable_is_listed_with_the_files_that_read_it() -> None:
    assert listed() == found()


def test_there_are_some() -> None:
    """Those who read nothing compare nothing."""
    assert {"LLAMA_CLEX_LONGROPE_DISABLE", "GGML_CLEX_ATTN_DISABLE", "GGML_AMX_DISABLE"} <= found().keys()
