"""Random programs on several sequences against each sequence alone, fed the same pieces in a context of its own."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np
import pytest

from clex_local import ClexError
from clex_local.library import llama_clex
from helpers.device_error import slack
from helpers.low_level import Context, Model
from helpers.random_architectures import make_architecture
from helpers.random_gguf import N_VOCAB, make_model

pytestmark = [pytest.mark.native, pytest.mark.sanitize]

N_SEQ, LIMIT = 4, 256
OPERATIONS = 250  # of one program
TOLERANCE = 1e-4

WEIGHTS = {
    "step": 10,  # one token for each of some sequences
    "prompt": 6,  # several tokens for one, in ubatches of 16
    "both": 2,  # one token that belongs to two sequences
    "declare": 2,
    "copy": 3,
    "cut": 3,
    "shift": 2,
    "drop": 1,
    "save": 2,
    "load": 2,
    "save all": 1,
    "load all": 1,
}


@dataclass
class Sequence:
    """What was done to a sequence since it was empty; cells have no other past."""

    history: list[Any] = field(default_factory=list)
    cells: list[object] = field(default_factory=list)  # one for each position; sequences may have some in common
    declared: int = 0

    @property
    def length(self) -> int:
        return len(self.cells)

    @property
    def wanted(self) -> int:
        """The length that it would choose its table by if it shared no cell."""
        return max(self.length, self.declared)


def new_cells(count: int) -> list[object]:
    return [object() for _ in range(count)]


class Machine:
    """Carries out operations; each takes any three numbers, and does nothing where they make no sense."""

    def __init__(self, model: Model, context: Context, unified: bool) -> None:
        self.model, self.context, self.unified = model, context, unified
        self.sequences = [Sequence() for _ in range(N_SEQ)]
        self.slots: list[tuple[bytes, Any]] = []
        self.snapshot: tuple[bytes, Any] | None = None

    def run(self, program: list[tuple[str, int, int, int]]) -> None:
        for name, *numbers in program:
            getattr(self, name.replace(" ", "_"))(*numbers)
            for s, sequence in enumerate(self.sequences):
                assert self.context.last_position(s) == sequence.length - 1
        for s in range(N_SEQ):
            self.check(s)

    def check(self, s: int) -> None:
        """Every logits of the sequence's past against a context that saw nothing else."""
        sequence = self.sequences[s]
        if not sequence.history:
            return
        with Context(self.model, n_ctx=LIMIT) as alone:
            for what, *values in sequence.history:
                if what == "feed":
                    tokens, position, declared, logits = values
                    llama_clex.seq_reserve(alone.pointer, 0, declared)
                    np.testing.assert_allclose(
                        logits, alone.feed(tokens, position), atol=TOLERANCE + slack(self.model.path), rtol=0
                    )
                elif what == "cut":
                    llama_cpp.llama_memory_seq_rm(alone.memory, 0, values[0], -1)
                else:
                    llama_cpp.llama_memory_seq_rm(alone.memory, 0, 0, values[0])
                    llama_cpp.llama_memory_seq_add(alone.memory, 0, values[0], -1, -values[0])

    def feed(self, batch: dict[int, list[int]]) -> None:
        items, ends = [], {}
        for s, tokens in batch.items():
            length = self.sequences[s].length
            items += [(t, length + i, [s], i == len(tokens) - 1) for i, t in enumerate(tokens)]
            ends[s] = len(items) - 1
        self.context.decode(items)
        for s, tokens in batch.items():
            self.sequences[s].cells += new_cells(len(tokens))
        for s, tokens in batch.items():
            self.fed(s, tokens, self.context.logits(ends[s]))

    def fed(self, s: int, tokens: list[int], logits: np.ndarray) -> None:
        sequence, wanted = self.sequences[s], self.agreed(s)
        sequence.history.append(("feed", tokens, sequence.length - len(tokens), wanted, logits))
        assert self.context.bucket(s) == (wanted - 1) // 64

    def agreed(self, s: int) -> int:
        """The length that decides for a sequence: that of the longest it shares cells with, directly or not."""
        group, cells = {s}, set(self.sequences[s].cells)
        while True:
            more = {i for i, other in enumerate(self.sequences) if not cells.isdisjoint(other.cells)}
            if more <= group:
                return max(self.sequences[i].wanted for i in group)
            group |= more
            cells.update(*(self.sequences[i].cells for i in group))

    def forget(self, s: int) -> None:
        self.check(s)
        llama_cpp.llama_memory_seq_rm(self.context.memory, s, -1, -1)
        sequence = self.sequences[s]
        self.sequences[s] = Sequence(declared=0 if sequence.length else sequence.declared)

    def step(self, a: int, b: int, c: int) -> None:
        chosen = [s for s in range(N_SEQ) if (a >> s) & 1 and self.sequences[s].length < LIMIT]
        if chosen:
            self.feed({s: [3 + (b + 31 * s) % (N_VOCAB - 3)] for s in chosen})

    def prompt(self, a: int, b: int, c: int) -> None:
        s, count = a % N_SEQ, 2 + b % 48
        if self.sequences[s].length + count <= LIMIT:
            self.feed({s: [3 + (c + i * i * 7) % (N_VOCAB - 3) for i in range(count)]})

    def both(self, a: int, b: int, c: int) -> None:
        first, second = a % N_SEQ, b % N_SEQ
        one, two = self.sequences[first], self.sequences[second]
        # one token is computed once: it must see the same cells in both, which streams of their own never share
        same = len(one.history) == len(two.history) and all(map(operator.is_, one.history, two.history))
        if first != second and self.unified and same and one.cells == two.cells and one.length < LIMIT:
            token = 3 + c % (N_VOCAB - 3)
            self.context.decode([(token, one.length, [first, second], True)])
            cell = new_cells(1)
            one.cells += cell
            two.cells += cell
            self.fed(first, [token], self.context.logits(0))
            self.fed(second, [token], self.context.logits(0))

    def declare(self, a: int, b: int, c: int) -> None:
        s, length = a % N_SEQ, (0 if b % 2 else c % (LIMIT + 1))
        assert llama_clex.seq_reserve(self.context.pointer, s, length)
        self.sequences[s].declared = length

    def copy(self, a: int, b: int, c: int) -> None:
        source, target = a % N_SEQ, b % N_SEQ
        if source != target and self.sequences[source].length:
            self.forget(target)
            llama_cpp.llama_memory_seq_cp(self.context.memory, source, target, -1, -1)
            original, declared = self.sequences[source], self.sequences[target].declared
            cells = list(original.cells) if self.unified else new_cells(original.length)
            self.sequences[target] = Sequence(list(original.history), cells, max(original.declared, declared))

    def cut(self, a: int, b: int, c: int) -> None:
        s = a % N_SEQ
        length = b % (self.sequences[s].length + 1)
        if length:
            llama_cpp.llama_memory_seq_rm(self.context.memory, s, length, -1)
            self.sequences[s].history.append(("cut", length))
            del self.sequences[s].cells[length:]

    def shift(self, a: int, b: int, c: int) -> None:
        s = a % N_SEQ
        sequence, count = self.sequences[s], 1 + b % 80
        # a cell has one position for all of its sequences
        shares = any(
            not set(sequence.cells).isdisjoint(other.cells) for other in self.sequences if other is not sequence
        )
        if not shares and sequence.length > count:
            llama_cpp.llama_memory_seq_rm(self.context.memory, s, 0, count)
            llama_cpp.llama_memory_seq_add(self.context.memory, s, count, -1, -count)
            sequence.history.append(("shift", count))
            del sequence.cells[:count]

    def drop(self, a: int, b: int, c: int) -> None:
        self.forget(a % N_SEQ)

    def save(self, a: int, b: int, c: int) -> None:
        s = a % N_SEQ
        if self.sequences[s].length:
            self.slots.append((self.context.save_sequence(s), copy.deepcopy(self.sequences[s])))

    def load(self, a: int, b: int, c: int) -> None:
        s = b % N_SEQ
        if self.slots:
            state, sequence = self.slots[a % len(self.slots)]
            self.check(s)
            assert self.context.load_sequence(state, s)
            self.sequences[s] = Sequence(list(sequence.history), new_cells(sequence.length), sequence.declared)

    def save_all(self, a: int, b: int, c: int) -> None:
        sequences = copy.deepcopy(self.sequences)
        last = max((s for s in range(N_SEQ) if sequences[s].length), default=-1)
        for sequence in sequences[last + 1 :]:
            sequence.declared = 0
        self.snapshot = self.context.save(), sequences

    def load_all(self, a: int, b: int, c: int) -> None:
        if self.snapshot:
            for s in range(N_SEQ):
                self.check(s)
            assert self.context.load(self.snapshot[0])
            self.sequences = copy.deepcopy(self.snapshot[1])


def program_of(seed: int, without: tuple[str, ...] = ()) -> list[tuple[str, int, int, int]]:
    rng = np.random.default_rng(seed)
    chosen = {name: weight for name, weight in WEIGHTS.items() if name not in without}
    weights = np.array(list(chosen.values()), float)
    names = rng.choice(list(chosen), OPERATIONS, p=weights / weights.sum())
    return [(str(name), *map(int, rng.integers(0, 2**16, 3))) for name in names]


def failure(model: Model, program: list[tuple[str, int, int, int]], unified: bool) -> str:
    """What goes wrong in a program; empty if nothing does."""
    with Context(model, n_seq=N_SEQ, n_ctx=N_SEQ * LIMIT, n_ubatch=16, unified=unified) as context:
        try:
            Machine(model, context, unified).run(program)
        except (AssertionError, ClexError) as error:
            return str(error) or repr(error)
    return ""


def shrunk(model: Model, program: list[tuple[str, int, int, int]], unified: bool) -> list[tuple[str, int, int, int]]:
    """A shorter program that fails as well."""
    size = len(program) // 2
    while size:
        start = 0
        while start < len(program):
            shorter = program[:start] + program[start + size :]
            if failure(model, shorter, unified):
                program = shorter
            else:
                start += size
        size //= 2
    return program


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    loaded = Model(make_model(tmp_path_factory.mktemp("random") / "tiny.gguf"))
    yield loaded
    loaded.close()


def check_program(model: Model, program: list[tuple[str, int, int, int]], unified: bool) -> None:
    if failure(model, program, unified):
        program = shrunk(model, program, unified)
        lines = "\n".join(map(str, program))
        pytest.fail(f"{failure(model, program, unified)}\nafter {len(program)} operations:\n{lines}")


@pytest.mark.parametrize("unified", [False, True], ids=["streams", "unified"])
@pytest.mark.parametrize("seed", range(10))
def test_random_operations_equal_each_sequence_alone(model, seed, unified):
    check_program(model, program_of(seed), unified)


# The state of a recurrent layer cannot lose some of its tokens, nor can it be that of two sequences at once. M-RoPE is
# never shifted.
OTHERS = {"olmo2": (), "smollm3": (), "lfm2": ("cut", "shift", "both"), "qwen2vl": ("shift",)}
# The window is longer than the sequences, or llama.cpp would take cells away that a shorter sequence sees again.
WINDOW = {"olmo2.attention.sliding_window": np.uint32(2 * LIMIT)}


@pytest.fixture(scope="module", params=OTHERS)
def other(request, tmp_path_factory):
    loaded = Model(make_architecture(tmp_path_factory.mktemp("random") / "tiny.gguf", request.param, more=WINDOW))
    yield request.param, loaded
    loaded.close()


@pytest.mark.parametrize("unified", [False, True], ids=["streams", "unified"])
@pytest.mark.parametrize("seed", range(3))
def test_random_operations_on_windows_recurrent_layers_and_other_ropes(other, seed, unified):
    name, model = other
    check_program(model, program_of(100 + seed, OTHERS[name]), unified)
