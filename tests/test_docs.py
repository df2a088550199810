"""The pages: what they take from the code is up to date, what they show runs, and their links lead somewhere."""

from __future__ import annotations

import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from docs import generate
from helpers.random_gguf import make_model

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "native" / "README.md"]
COMMANDS = dict(generate.commands())


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_options_are_those_of_the_commands() -> None:
    assert generate.CLI.read_text(encoding="utf-8") == generate.cli(), "run make docs"
    assert {"clex-chat", "clex-convert", "clex-eval ppl", "clex-inspect", "clex-train"} <= COMMANDS.keys()


def test_the_commands_of_a_conversation_are_those_there_are() -> None:
    text = generate.CHAT.read_text(encoding="utf-8")
    assert text == generate.chat(), "run make docs"
    assert "| `/file PATH`, `/read` |" in text


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs the git repository")
def test_every_file_has_its_line() -> None:
    assert generate.ARCHITECTURE.read_text(encoding="utf-8") == generate.architecture(), "run make docs"


def test_the_names_in_the_traces_exist() -> None:
    text = generate.TREE.sub("", generate.ARCHITECTURE.read_text(encoding="utf-8"))
    names = re.findall(r"`(clex_[a-z]+(?:\.\w+)+)`", text)
    assert len(names) > 20
    for name in names:
        pkgutil.resolve_name(name)  # raises where there is nothing of that name
    native = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "native").rglob("*") if path.is_file())
    missing = [name for name in re.findall(r"`((?:llama|ggml)_\w+(?:::\w+)?)`", text) if name not in native]
    assert not missing


def shown_commands() -> list[tuple[str, str]]:
    """Every command of ours in a block of a page, with the page."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in re.sub(r"\$\([^)]*\)", "FILE", block.replace("\\\n", " ")).splitlines():
                found += [(name_of(page), part) for part in re.findall(r"(?:^|\| )(clex-[^|]*)", line.split("  #")[0])]
    return found


@pytest.mark.parametrize(("page", "line"), shown_commands())
def test_commands_have_the_options_that_pages_show(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    name = next(name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS)
    command = COMMANDS[name]
    arguments = words[len(name.split()) :]
    if ">" in arguments:
        arguments = arguments[: arguments.index(">")]
    context = click.Context(command, info_name=name)
    command.make_parser(context).parse_args(arguments)  # raises click.UsageError for an option that there is not


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("index", range(3))
def test_what_the_page_on_threads_shows_runs(tmp_path: Path, index: int) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "threads.md").read_text(encoding="utf-8"), re.DOTALL)
    make_model(tmp_path / "long.gguf", original=128)
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", blocks[index]], cwd=tmp_path, env=env, capture_output=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.strip()
    assert len(blocks) == 3
    assert index < 2 or done.stdout == b"cancelled\n"


def test_one_version_of_the_bindings_is_named_everywhere() -> None:
    files = ["Makefile", "native/llama-cpp-python.txt", "docs/install.md", "requirements-frameworks.txt"]
    named = {name: re.findall(r"llama-cpp-python(?:\[\w+\])?==([\d.]+)", (ROOT / name).read_text()) for name in files}
    assert all(named.values())
    assert len({version for versions in named.values() for version in versions}) == 1, named


def test_the_workflow_runs_on_every_python_that_is_claimed() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    matrix = workflow["jobs"]["ci"]["strategy"]["matrix"]
    lowest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert lowest
    assert matrix["python"][0] == lowest[1]
    assert any(step.get("run") == ".ci/run" for step in workflow["jobs"]["ci"]["steps"])
