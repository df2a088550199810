"""Writes what the pages take from the code: options of commands, files and architectures.

``python -m docs.generate`` writes them anew; the tests compare.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import textwrap
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path

import click

from clex_local.chat.commands import page_table
from clex_local.model_file.architectures import families, table

ROOT = Path(__file__).parent.parent
README, CLI = ROOT / "README.md", ROOT / "docs" / "cli.md"
CHAT = ROOT / "docs" / "chat.md"
ARCHITECTURE, ARCHITECTURES = ROOT / "docs" / "architecture.md", ROOT / "docs" / "architectures.md"

HEAD = """# Commands

Made from the commands themselves by `python -m docs.generate`. What they are for: [converting](convert.md),
[chatting](chat.md), [serving](serve.md), [several machines](rpc.md), [what is kept](store.md),
[inspecting](inspect.md), [evaluating](clex-eval.md), [training](train.md).
"""
TREE = re.compile(r"(?<=<!-- tree -->\n).*?(?=<!-- end of tree -->)", re.DOTALL)
LIST = re.compile(r"(?<=<!-- architectures -->\n).*?(?=\n<!-- end of architectures -->)", re.DOTALL)
CHAT_COMMANDS = re.compile(r"(?<=<!-- commands -->\n).*?(?=\n<!-- end of commands -->)", re.DOTALL)

# Folders that hold one thing in many files, and files that have no comment to take a line from.
FOLDERS = {
    "docs/img": "pictures",
    "examples/bytes": "a small trained model with a CLEX layer; tokens are bytes",
    "examples/smollm2-long": "a LoRA adapter of the demo's model, trained to read four times as many tokens",
    "tests/data": "tiny models with logits computed by the authors' code",
}
FILES = {
    ".ci/run": "everything that has to pass: tests, style and types, site, demo",
    ".github/workflows/wheels.yml": "makes and tries a wheel for each system",
    ".github/workflows/ci.yml": "runs `.ci/run` on the Pythons and systems that are claimed",
    ".containerignore": "what a container's build does not get",
    ".dockerignore": "the same for Docker",
    ".gitignore": "what builds and tests leave behind",
    ".pre-commit-config.yaml": "style before each commit",
    "CHANGELOG.md": "what users notice, by version",
    "CMakeLists.txt": "builds llama.cpp with our patches and sources",
    "Containerfile": "an image with the server and the commands",
    "CONTRIBUTING.md": "how to work on this",
    "LICENSE": "MIT",
    "Makefile": "every task: demo, test, lint, native, site, bench",
    "README.md": "what it is for, and where to begin",
    "RELEASE.md": "how a version is made",
    "examples/deepspeed_zero3.json": "ZeRO-3 for `clex-train --trainer-args`, as CLEX's authors set it",
    "examples/fsdp.json": "FSDP for `clex-train --trainer-args`",
    "pyproject.toml": "the package, and the settings of ruff, basedpyright and pytest",
    "benchmarks/emma_questions.jsonl": "questions about *Emma*, their answers and the passages that have them",
    "benchmarks/long_chat_results.jsonl": "what the chat model answered when it was evaluated, line by line",
    "convert/clex_convert/check.txt": "the text that a full check reads",
    "native/README.md": "how the native side works",
    "native/llama-cpp-python.txt": "the pin of llama.cpp: a source distribution and its hash",
    "startup/clex_local.pth": "makes Python import the module beside it as it starts",
}
KINDS = {"py.typed": "says that the types of the package count", ".svg": "a picture"}


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command of the package and every subcommand, each with its full name."""
    scripts = (
        (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.scripts]\n")[2].partition("[")[0]
    )
    for name, module, function in re.findall(r'^(\S+) = "([\w.]+):(\w+)"$', scripts, re.MULTILINE):
        command = getattr(importlib.import_module(module), function)
        yield name, command
        for part, subcommand in sorted(getattr(command, "commands", {}).items()):
            yield f"{name} {part}", subcommand


def cli() -> str:
    """The text of `docs/cli.md`."""
    return HEAD + "".join(_section(name, command) for name, command in commands())


def _section(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name, **command.context_settings)
    usage = " ".join(command.collect_usage_pieces(context))
    paragraphs = [" ".join(part.split()) for part in (command.help or "").replace("\b\n", "").split("\n\n")]
    rows = ["| option | meaning |", "| --- | --- |"]
    for option in command.params:
        if isinstance(option, click.Option) and (record := option.get_help_record(context)):
            names, meaning = (" ".join(part.split()).replace("|", "\\|") for part in record)
            # Ranges such as "x>=1" are for the terminal, where a wrong value has just been refused.
            meaning = re.sub(r"(; | \[)[-\d<=]*x[<>][^\]]*\]", lambda m: "]" if m[1] == "; " else "", meaning)
            rows.append(f"| `{names}` | {meaning} |")
    return "\n".join([f"\n## {name}\n", f"`{name} {usage}`\n", *(f"{text}\n" for text in paragraphs), *rows, ""])


def readme() -> str:
    """The text of `README.md`, with the architectures there are."""
    items = (
        f"Tables by length: {families()} ([which classes, and what was compared](docs/architectures.md)).",
        f"A CLEX layer of its own (`clex-train`): {families(trained=True)}.",
    )
    lines = [textwrap.fill(f"* {item}", 120, subsequent_indent="  ", break_on_hyphens=False) for item in items]
    return LIST.sub(lambda _: "\n".join(lines), README.read_text(encoding="utf-8"))


def architectures() -> str:
    """The text of `docs/architectures.md`, with the table of those there are."""
    return LIST.sub(lambda _: table(), ARCHITECTURES.read_text(encoding="utf-8"))


def chat() -> str:
    """The text of `docs/chat.md`, with the commands of a conversation."""
    return CHAT_COMMANDS.sub(lambda _: page_table(), CHAT.read_text(encoding="utf-8"))


def tree() -> str:
    """Every file of the repository but for data, by folder, with a line about each."""
    folders: dict[str, list[str]] = {}
    for path in repository_files():
        if not any(path.startswith(f"{folder}/") for folder in FOLDERS):
            folder, _, name = path.rpartition("/")
            folders.setdefault(folder, []).append(f"| `{name}` | {describe(ROOT / path)} |")
    lines = []
    for folder in sorted(folders):
        lines += [f"\n### {folder or 'At the top'}\n", "| file | what it is |", "| --- | --- |", *folders[folder]]
    lines += ["\n### Data\n", "| folder | what it holds |", "| --- | --- |"]
    lines += [f"| `{folder}/` | {text} |" for folder, text in FOLDERS.items() if (ROOT / folder).is_dir()]
    return "\n".join([*lines, "\n"])


def repository_files() -> list[str]:
    """Paths of all files that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({path for path in listed if (ROOT / path).is_file()})


def describe(path: Path) -> str:
    """The line about a file: its docstring's or its comment's first sentence.

    Raises:
        ValueError: it has none.
    """
    name = path.relative_to(ROOT).as_posix()
    text = FILES.get(name) or KINDS.get(path.name) or KINDS.get(path.suffix) or _native_line(path) or _first_words(path)
    if not text:
        raise ValueError(f"{name}: begin it with a docstring or a comment that says what it is")
    sentence = re.split(r"(?<=[\w)`*])\.\s", " ".join(text.split("\n\n")[0].split()))[0].rstrip(".:")
    return sentence.replace("|", "\\|")


def _first_words(path: Path) -> str | None:
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text))
    if path.suffix == ".patch":
        return HeaderParser().parsestr(text).get("Subject")
    if path.suffix == ".md":
        return text.partition("\n")[0].lstrip("# ")
    mark = r"//" if path.suffix in (".cpp", ".h", ".cu", ".cuh") else "#"
    found = re.search(rf"^(?:{mark} ?(?!!).*\n)+", "\n".join(text.splitlines()[:12]) + "\n", re.MULTILINE)
    return re.sub(rf"^{mark} ?", "", found[0], flags=re.MULTILINE) if found else None


def _native_line(path: Path) -> str | None:
    """What native/README.md says of a source file."""
    text = (ROOT / "native" / "README.md").read_text(encoding="utf-8")
    for pattern, meaning in re.findall(r"^\| `src/([^`]+)` \| (.*) \|$", text, re.MULTILINE):
        if path.match(pattern):
            return meaning
    return None


def architecture() -> str:
    """The text of `docs/architecture.md` with the tree that there is."""
    return TREE.sub(lambda _: tree(), ARCHITECTURE.read_text(encoding="utf-8"))


PAGES = {README: readme, CLI: cli, CHAT: chat, ARCHITECTURE: architecture, ARCHITECTURES: architectures}


def main() -> None:
    """Write the pages."""
    for page, text in PAGES.items():
        page.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
