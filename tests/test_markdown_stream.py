"""Answers as Markdown while they come: shown once, whole, harmless, whatever pieces they come in."""

from __future__ import annotations

import io
import random
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from clex_local.chat.answer_view import CONTROLS, MarkdownView
from clex_local.chat.markdown_stream import MarkdownStream
from clex_local.session.thoughts import Thoughts

pytestmark = pytest.mark.chat

ANSWER = """\
# The sea

It is **very _deep_** and *blue*, see `depth()` or [a page](https://sea.org/x_y).

- one: 2 * 3 * 4 and snake_case_name
  - two **bold** end
1. first
10) tenth
> quoted *so*
> > twice

```python
def f(*args, **kwargs):  # **not bold**
    return `x`
```

| name | depth |
| :--- | ---: |
| **Emma** | 10 |
| pipe \\| in | `a|b` |

---
A star \\* and **unclosed bold
~~gone~~ ~5 and ``a ` b`` and _it_.
🫠 emoji, עברית and العربية, 中文字.
"""


def show(pieces: list[str], width: int = 60, view: type = MarkdownStream) -> str:
    """What is written to a terminal."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, highlight=False, color_system="standard")
    stream = view(console)
    for piece in pieces:
        stream.write(piece)
    stream.end()
    return console.file.getvalue()


def plain(text: str) -> str:
    """What one sees in the end, without styles."""
    text = re.sub(r"\x1b\[[\d;]*m", "", text)
    while back := re.search(r"\x1b\[(\d+)D\x1b\[K", text):
        before, cells = text[: back.start()], int(back[1])
        while cells > 0:
            before, cells = before[:-1], cells - cell_len(before[-1])
        text = before + text[back.end() :]
    return text


def styled(text: str, word: str) -> str:
    """The codes in front of a word."""
    found = re.search(rf"(\x1b\[[\d;]*m)?{re.escape(word)}", text)
    assert found, (word, text)
    return (found[1] or "")[2:-1]


def test_elements_are_shown_as_what_they_are():
    text = show([ANSWER], 100)
    assert styled(text, "The") == "1;4"
    assert "very deep" in plain(text)
    assert styled(text, "blue") == "3"
    assert styled(text, "depth()") == "36"
    assert "a page (https://sea.org/x_y)" in plain(text)
    assert "• one: 2 * 3 * 4 and snake_case_name\n  • two bold end\n1. first\n10) tenth\n" in plain(text)
    assert "▌ quoted so\n▌ ▌ twice\n" in plain(text)
    assert "python\ndef f(*args, **kwargs):  # **not bold**\n    return `x`\n\n" in plain(text)
    assert "A star * and **unclosed bold\ngone ~5 and a ` b and it.\n" in plain(text)
    assert re.search(r"name +depth *\n", plain(text))
    assert re.search(r"Emma +10 *\n", plain(text))
    assert "─" * 40 in plain(text)
    assert "🫠 emoji, עברית and العربية, 中文字.\n" in plain(text)


@pytest.mark.parametrize("width", [5, 40, 80, 200])
def test_pieces_make_no_difference(width):
    whole = plain(show([ANSWER], width))
    assert plain(show(list(ANSWER), width)) == whole
    draw = random.Random(0)
    for _ in range(30):
        cuts = sorted(draw.sample(range(len(ANSWER)), 40))
        pieces = [ANSWER[start:end] for start, end in zip([0, *cuts], [*cuts, None], strict=True)]
        assert plain(show(pieces, width)) == whole


@pytest.mark.parametrize("width", [20, 40, 72])
def test_lines_break_between_words(width):
    words = "- The **sea is very** deep, and `its bottom` is dark: 🫠 שלום donaudampfschiffe 中文字中文字中文字 end"
    for pieces in ([words], list(words), re.findall(r"..?.?", words)):
        lines = plain(show(pieces, width)).splitlines()
        assert max(map(cell_len, lines)) < width
        assert all(line.startswith("  ") for line in lines[1:])
        expected = words.replace("- ", "• ").replace("*", "").replace("`", "")
        assert "".join("".join(lines).split()) == "".join(expected.split())
        assert all(word in " ".join(line.strip() for line in lines) for word in ("very", "bottom", "donaudampfschiffe"))
    lines = plain(show(["x" * 50 + " yy " + "z" * 15], 20)).splitlines()
    assert "".join(lines).replace(" ", "") == "x" * 50 + "yy" + "z" * 15


def test_nothing_of_what_is_no_markdown_is_lost():
    """Every letter and figure is shown, in its order."""
    draw = random.Random(1)
    letters = "ab1 *_`~[]()#>-+.|\\\n:<&é"
    for _ in range(400):
        text = "".join(draw.choices(letters, k=draw.randrange(1, 60)))
        shown = plain(show(list(text), 200))
        if "```" not in text and "~~~" not in text and "|" not in text:  # a fence's line is not shown, a table is cut
            assert re.findall(r"[ab1é<&]", shown) == re.findall(r"[ab1é<&]", text), repr(text)


def test_words_are_shown_as_they_come():
    console = Console(file=io.StringIO(), width=60, force_terminal=True, highlight=False)
    stream = MarkdownStream(console)
    for piece, shown in [
        ("The", "The"),
        (" sea is", "The sea is"),
        (" **ve", "The sea is "),
        ("ry** ", "The sea is very "),
        ("(5 * 3", "The sea is very (5 * 3"),
    ]:
        stream.write(piece)
        assert plain(console.file.getvalue()) == shown


def test_long_line_that_never_ends_an_element_is_shown():
    console = Console(file=io.StringIO(), width=60, force_terminal=True, highlight=False)
    stream = MarkdownStream(console)
    stream.write("`" + "x" * 20_000)
    assert plain(console.file.getvalue()).count("x") == 20_000


def test_answer_cannot_control_the_terminal():
    attack = "\x1b]0;owned\x07\x9b31m\rred\x1b[2J\x08\u202ecba\u2066"
    text = show(
        [f"a {attack} **{attack}**\n`{attack}`\n| {attack} |\n|---|\n| {attack} |\n```\n{attack}\n```\n"],
        80,
        MarkdownView,
    )
    assert plain(text).count("owned") == 6
    assert not set(plain(text)) & {chr(code) for code in CONTROLS}
    assert set(re.findall(r"\x1b[^m]*m", text)) <= {f"\x1b[{code}m" for code in ("0", "1", "36", "1;36", "2", "2;36")}


# What is thought


def parts(pieces: list[str], begun: bool = False) -> tuple[str, str]:
    thoughts = Thoughts(begun)
    found = [part for piece in pieces for part in thoughts.feed(piece)] + list(thoughts.feed("", last=True))
    assert "".join(text for thought, text in found if thought) == thoughts.text
    return thoughts.text, "".join(text for thought, text in found if not thought)


@pytest.mark.parametrize(
    ("text", "begun", "thought", "answer"),
    [
        ("<think>\nHm <b>.\n</think>\n\nYes.", False, "\nHm <b>.\n", "Yes."),
        ("\n <think>a</think>b", False, "a", "b"),
        ("a</think>b", True, "a", "b"),
        ("Plain <think> text </think>.", False, "", "Plain <think> text </think>."),
        ("<think>a</think>b <think>c</think>", False, "a", "b <think>c</think>"),
        ("<think>endless", False, "endless", ""),
        ("<thin", False, "", "<thin"),
        ("<think>a</thin", False, "a</thin", ""),
        ("", True, "", ""),
    ],
)
def test_thoughts_are_told_from_answers(text, begun, thought, answer):
    assert parts([text], begun) == parts(list(text), begun) == (thought, answer)


@pytest.mark.parametrize("width", [12, 40, 200])
def test_thoughts_are_one_line(width):
    text = show([f"<think>{'hm 🫠 中文 ' * 50}", "\n\nmore " * 30, "</think>\nYes.\n"], width, MarkdownView)
    before, _, after = text.rpartition("\r\x1b[2K")
    assert plain(before).count("\n") == 0
    assert plain(after).endswith("\nYes.\n")
    for line in plain(text).split("\r\x1b[2K"):
        assert Console(width=500).measure(line.split("\n")[0]).maximum < max(width, 5)
