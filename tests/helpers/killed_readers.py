"""Processes that read a text and store it, killed at random moments: what is left gives the same answer.

As a program it does so as often as it is told::

    cd tests && python -m helpers.killed_readers 200
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clex_local.store.documents import DocumentStore
from helpers.low_level import Context, Model
from helpers.processes import run
from helpers.random_gguf import make_model, random_tokens
from helpers.stored_texts import BLOCK, TEXT_OPTIONS, block_files, read

IDS = random_tokens(1100)
PIECE = 64

# Reads the text, then another one, in pieces; says after each how much was handed over, and how much is written.
READER = """
import sys
from clex_local.store.documents import DocumentStore
from helpers.killed_readers import IDS, PIECE
from helpers.low_level import Context, Model
from helpers.random_gguf import random_tokens
from helpers.stored_texts import TEXT_OPTIONS
model = Model(sys.argv[1])
store = DocumentStore(sys.argv[2])
for ids in (IDS, random_tokens(1100, seed=int(sys.argv[3]))):
    with Context(model, **TEXT_OPTIONS) as context:
        for begin in range(0, len(ids), PIECE):
            context.feed(ids[begin : begin + PIECE], begin)
            store.save(context.pointer, ids[: begin + PIECE])
            print(begin + PIECE, store.stats.stored, flush=True)
store.close()
"""


@dataclass
class Killed:
    """What was seen.

    Attributes:
        rounds: processes that were killed.
        lost: how often so many whole blocks were not there that had been handed over, and were on their way.
        restored: how often so many tokens were.
        unfinished: files that were being written.
    """

    rounds: int = 0
    lost: Counter[int] = field(default_factory=Counter)
    restored: Counter[int] = field(default_factory=Counter)
    unfinished: int = 0


def kill(path: Path, folder: Path, rounds: int, seed: int = 2) -> Killed:
    """Kill a reader so many times.

    Args:
        path: a model.
        folder: of the store, emptied after each time.
        rounds: how often.
        seed: of the moments.

    Raises:
        AssertionError: another answer, a damaged file, or a block lost that was written.
    """
    rng, result = random.Random(seed), Killed()
    with closing(Model(path)) as model:
        with Context(model, **TEXT_OPTIONS) as context:
            expected = read(context, IDS)
        for _ in range(rounds):
            done, written = _kill_one(path, folder, rng)
            with DocumentStore(folder) as store, Context(model, **TEXT_OPTIONS) as context:
                count = store.restore(context.pointer, IDS)
                assert np.array_equal(read(context, IDS, count), expected), "another answer"
                assert count >= written, "a block is lost that was written"
                lost = max(0, done // BLOCK - count // BLOCK)
                assert count <= len(block_files(folder)) * BLOCK
                check = store.check()
                assert check.damaged == 0, "a block is damaged"
                assert check.orphans == 0, "nothing leads to a block"
                store.clear()
            parts = list(folder.rglob("*.clexpart"))
            for part in parts:
                part.unlink()
            result.rounds += 1
            result.lost[lost] += 1
            result.restored[count] += 1
            result.unfinished += len(parts)
    return result


def _kill_one(path: Path, folder: Path, rng: random.Random) -> tuple[int, int]:
    """Kill a reader somewhere in the first text: tokens of it that were handed over, and that were written."""
    with run(READER, path, folder, 9) as process:
        assert process.stdout is not None
        done = written = 0
        for _ in range(rng.randrange(1, 1100 // PIECE)):
            done, written = map(int, process.stdout.readline().split())
        time.sleep(rng.random() * 0.01)
        process.kill()
    return done, written


def main() -> None:
    """As often as the argument says."""
    rounds, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2
    with tempfile.TemporaryDirectory(prefix="clex-killed-") as folder:
        path = make_model(Path(folder) / "tiny.gguf", original=2048)
        begin = time.monotonic()
        result = kill(path, Path(folder) / "documents", rounds, seed)
        print(f"{result} in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
