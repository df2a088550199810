"""The README's tables of options are those of the commands. `python tests/test_readme.py` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from clex_convert.cli import main as clex_convert
from clex_eval.longbench import command as clex_eval_longbench
from clex_eval.passkey import command as clex_eval_passkey
from clex_eval.ppl import command as clex_eval_ppl
from clex_eval.ruler import command as clex_eval_ruler
from clex_local.chat import main as clex_chat
from clex_local.inspect_command import main as clex_inspect
from clex_train.cli import main as clex_train

pytestmark = pytest.mark.docs

README = Path(__file__).parent.parent / "README.md"
COMMANDS = {
    "clex-convert": clex_convert,
    "clex-train": clex_train,
    "clex-chat": clex_chat,
    "clex-inspect": clex_inspect,
    "clex-eval ppl": clex_eval_ppl,
    "clex-eval passkey": clex_eval_passkey,
    "clex-eval ruler": clex_eval_ruler,
    "clex-eval longbench": clex_eval_longbench,
}
LIKE = dict.fromkeys((clex_eval_passkey, clex_eval_ruler, clex_eval_longbench), clex_eval_ppl)


def records(command: click.Command) -> list[tuple[str, str] | None]:
    context = click.Context(command, **command.context_settings)
    return [option.get_help_record(context) for option in command.params if isinstance(option, click.Option)]


def options_table(command: click.Command) -> str:
    """The options of a command; of one that is like another those that the other does not have."""
    rows = ["| option | meaning |", "| --- | --- |"]
    known = records(LIKE[command]) if command in LIKE else []
    for record in records(command):
        if record and record not in known:
            names, meaning = (" ".join(part.split()).replace("|", "\\|") for part in record)
            # Ranges such as "x>=1" are for the terminal, where a wrong value has just been refused.
            meaning = re.sub(r"(; | \[)[-\d<=]*x[<>][^\]]*\]", lambda m: "]" if m[1] == "; " else "", meaning)
            rows.append(f"| `{names}` | {meaning} |")
    return "\n".join(rows)


def with_tables(text: str) -> str:
    for name, command in COMMANDS.items():
        start, end = f"<!-- options of {name} -->\n", "<!-- end of options -->"
        pattern = re.escape(start) + ".*?" + re.escape(end)
        text, count = re.subn(pattern, lambda _: f"{start}{options_table(command)}\n{end}", text, flags=re.DOTALL)  # noqa: B023
        assert count == 1, name
    return text


def test_options_in_the_readme_are_those_of_the_commands():
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run python tests/test_readme.py"


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")))
def test_links_lead_somewhere(link):
    assert link.startswith("https://") or (README.parent / link).exists()


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
