"""Every test belongs to an area, so that the tests of what was touched are one command."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.docs


def test_every_file_of_tests_is_in_an_area(pytestconfig: pytest.Config) -> None:
    areas = [line.split(":")[0] for line in pytestconfig.getini("markers") if ": area: " in line]
    texts = {path.name: path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py")}
    assert not [name for name, text in texts.items() if not any(f"pytest.mark.{area}" in text for area in areas)]
