"""The web page of clex-serve in Chromium: a question, a file, the progress of a long text, and the context meter."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from clex_local import Server, serve

pytestmark = pytest.mark.serve

MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", MAC))), None)


@pytest.fixture(scope="module")
def server(smollm, tmp_path_factory) -> Iterator[Server]:
    from clex_convert import convert

    model = tmp_path_factory.mktemp("page") / "SmolLM2-135M-long.gguf"
    convert(smollm, model, method="ntk", original_context=512, max_factor=4)
    options: dict[str, Any] = {"port": 0, "ctx": 0, "parallel": 1, "threads": 1, "batch": 64, "seed": 1}
    with serve(model, server_args=("--no-warmup", "--temp", "0"), **options) as server:
        if not server.has_page:
            pytest.skip("this build has no page: it was made without npm")
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian: apt install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1100, "height": 760})
    page.set_default_timeout(60_000)
    page.goto(server.url)
    yield page
    page.close()


def ask(page: Any, text: str) -> None:
    page.locator("form [role=textbox], form textarea").first.click()
    page.keyboard.insert_text(text)
    page.keyboard.press("Enter")


def meter(page: Any) -> str:
    """What the context meter says."""
    page.locator("[data-context-gauge-trigger]").hover()
    return page.get_by_role("status").filter(has_text="Context").first.inner_text()


def test_question_is_answered(page):
    ask(page, "Name the capital of France.")
    page.get_by_text("Paris").first.wait_for()
    page.locator("[data-context-gauge-table]").or_(page.locator("[data-context-gauge-trigger]")).first.wait_for()
    said = meter(page)
    assert "2.05K" in said or "2.0K" in said or "2K" in said
    assert "RoPE table t = 1" in said
    assert "up to 512 tokens" in said


def test_file_is_read_with_progress_and_the_table_of_its_length(page, tmp_path):
    text = "The grass is green. The sky is blue. The sun is yellow. Here we go. " * 60
    (tmp_path / "report.txt").write_text(text + "The pass key is 71432. Remember it.")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "report.txt")
    ask(page, "What is the pass key?")
    reading = page.locator("[data-reading-context]").filter(has_text="RoPE table t = 3, up to 1,536 tokens")
    reading.wait_for()
    page.get_by_text(re.compile(r"Processing \d+% \(ETA: \d+s\)")).first.wait_for()
    assert re.search(r"[\d,]+ of 1,\d+ tokens read, context 2,048", reading.inner_text())
    said = meter(page)
    assert "RoPE table t = 3" in said
    assert "up to 1,536 tokens" in said
    assert page.screenshot(path=tmp_path / "page-reading.png")
    page.wait_for_function("() => !document.querySelector('.shimmer-text')")
    page.get_by_text("71432").last.wait_for()
    assert "RoPE table t = 3" in meter(page)
    # Those of the docs: pytest --basetemp build/page -k file, then their copies are in docs/img.
    assert page.screenshot(path=tmp_path / "page.png")
