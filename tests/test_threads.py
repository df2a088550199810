"""How many threads compute a graph on the CPU: decided on machines made up here; no result depends on it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clex_local.library.loading import library_path

CPU = library_path() / ("libggml-cpu.dylib" if sys.platform == "darwin" else "libggml-cpu.so")
WORK = 1e8  # multiplications of a graph
SECOND = 1_000_000

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not CPU.exists(), reason="the CPU backend is not a library of this name"),
]

SCRIPT = """
import ctypes, sys
import numpy as np
sys.path.insert(0, sys.argv[3])
from helpers.low_level import F16, F32, Q8_0, Context, Model
import llama_cpp

fix = ctypes.CDLL(sys.argv[2]).ggml_clex_threads_fix
model = Model(sys.argv[1])
tokens = [3 + i * 37 % 500 for i in range(700)]

def compute(planned, used, alone, **options):
    fix(used, alone)
    with Context(model, n_ctx=2048, n_seq=2, **options) as context:
        llama_cpp.llama_set_n_threads(context.pointer, planned, planned)
        out = [context.feed(tokens[:512], 0), context.feed(tokens[512:590], 512)]
        out += [context.feed(tokens[i : i + 1], i) for i in range(590, 593)]
        context.feed(tokens[40:80], 0, sequence=1)
        context.decode([(5, 593, [0], True), (6, 40, [1], True)])
        return np.stack([*out, context.logits(0), context.logits(1)])

for options in ({}, dict(flash_attn=1, type_k=F16, type_v=F16), dict(flash_attn=1, type_k=Q8_0, type_v=Q8_0)):
    for planned in (2, 3):
        expected = compute(planned, planned, 0, **options)
        assert np.isfinite(expected).all() and expected.any()
        for used, alone in ((1, 0), (2, 0), (planned, 20)):
            found = compute(planned, used, alone, **options)
            assert (found == expected).all(), (planned, used, alone, options, abs(found - expected).max())
"""


@pytest.mark.parametrize(
    ("outtype", "environment"),
    [
        ("f32", {}),
        ("f32", {"GGML_CLEX_ATTN_DISABLE": "1"}),
        ("q8_0", {"GGML_AMX_DISABLE": "1"}),
        ("q8_0", {"GGML_CLEX_TILES": "software"}),
        ("q8_0", {"GGML_CLEX_MATMUL_DISABLE": "1", "GGML_AMX_DISABLE": "1"}),
    ],
)
def test_results_do_not_depend_on_how_many_of_the_planned_threads_compute(golden_dir, tmp_path, outtype, environment):
    """Bit for bit, also where the first thread computes the last nodes alone."""
    from clex_convert import convert

    model = tmp_path / "model.gguf"
    convert(golden_dir("llama"), model, outtype=outtype, method="ntk", max_factor=32)
    command = [sys.executable, "-c", SCRIPT, str(model), str(CPU), str(Path(__file__).parent)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Ladder:
    """The decision for one kind of graph."""

    def __init__(self, planned: int) -> None:
        library = ctypes.CDLL(str(CPU))
        number, integer, pointer = ctypes.c_double, ctypes.c_int64, ctypes.c_void_p
        self.new, self.free, self.next, self.single_time, self.limit, self.tell = (
            library[f"ggml_clex_{name}"]
            for name in (
                "ladder_new",
                "ladder_free",
                "ladder_threads",
                "ladder_single_time",
                "ladder_time_limit",
                "ladder_report",
            )
        )
        self.new.argtypes, self.new.restype, self.free.argtypes = [ctypes.c_int], pointer, [pointer]
        self.next.argtypes = [pointer, integer]
        self.single_time.argtypes, self.single_time.restype = [pointer, number], integer
        self.limit.argtypes, self.limit.restype = [integer, number], integer
        self.tell.argtypes = [pointer, ctypes.c_int, number, *[integer] * 4, ctypes.c_bool]
        self.pointer = self.new(planned)


Speed = Callable[[int], float]  # multiplications per microsecond with so many threads


class Machine:
    """Computes graphs one after another."""

    def __init__(self, planned: int) -> None:
        self.ladder = Ladder(planned)
        self.now = SECOND

    def close(self) -> None:
        self.ladder.free(self.ladder.pointer)

    def graph(self, speed: Speed, work: float, busy: bool) -> tuple[int, bool]:
        """Threads with which one is computed, and whether the others are sent away before the end."""
        ladder = self.ladder
        threads = ladder.next(ladder.pointer, self.now)
        single = ladder.single_time(ladder.pointer, work)
        took, given_up = work / speed(threads), False
        # the limit grows with what is done: a graph that keeps it at the end kept it all the time
        if threads > 1 and took > ladder.limit(single, 1.0):
            part = next(i / 1000 for i in range(1, 1001) if took * i / 1000 > ladder.limit(single, i / 1000))
            took, given_up = took * part + work * (1 - part) / speed(1), True
        took = round(took)
        self.now += took
        # beside others a thread computes for half the time
        cpu, preemptions = (took // 2, took // 8000) if busy else (took, 0)
        ladder.tell(ladder.pointer, threads, work, self.now, took, cpu, preemptions, given_up)
        return threads, given_up

    def run(self, seconds: float, speed: Speed, work: float = WORK, busy: bool = False) -> tuple[float, list[int]]:
        """Multiplications per microsecond, and the threads of each graph."""
        start, counts = self.now, []
        while self.now < start + seconds * SECOND:
            counts.append(self.graph(speed, work, busy)[0])
        return work * len(counts) / (self.now - start), counts


@pytest.fixture
def machine() -> Iterator[Callable[[int], Machine]]:
    made: list[Machine] = []

    def make(planned: int) -> Machine:
        made.append(Machine(planned))
        return made[-1]

    yield make
    for one in made:
        one.close()


def free(threads: int) -> float:
    return 15_000 * threads**0.8


def collapsed(threads: int) -> float:
    """Half of a core for one thread; several wait for each other's time slices at every barrier."""
    return 7_500 if threads == 1 else 100


@pytest.mark.parametrize("planned", [1, 2, 3, 16])
def test_all_threads_compute_while_no_one_else_wants_the_cores(machine, planned):
    found = machine(planned)
    jitter = iter(1 + 0.1 * (i * 7919 % 100 / 100) for i in range(100_000))
    assert set(found.run(10, lambda n: free(n) * next(jitter))[1]) == {planned}


def test_a_pause_of_a_few_milliseconds_changes_nothing(machine):
    found = machine(2)
    found.run(1, free)
    counts = [found.graph(lambda n: 1 / (1 / free(n) + 5_000 / WORK), WORK, True)]
    assert counts == [(2, False)]
    assert set(found.run(1, free)[1]) == {2}


@pytest.mark.parametrize("planned", [2, 3, 16])
@pytest.mark.parametrize("work", [1e7, WORK, 2e10])  # 0.7 ms with one thread, 7 ms, and 1.3 s
def test_one_thread_computes_while_several_collapse(machine, planned, work):
    found = machine(planned)
    found.run(10, free, work)
    found.run(5, collapsed, work, busy=True)  # until it is known that more threads are slow
    speed, counts = found.run(20, collapsed, work, busy=True)
    assert speed > 0.85 * collapsed(1)
    assert counts.count(1) > 0.5 * len(counts)
    found.run(2 if work < 1e10 else 20, free, work)
    speed, counts = found.run(5, free, work)
    assert set(counts) == {planned}


def test_a_collapse_costs_no_more_than_a_graph_of_one_thread_at_once(machine):
    found = machine(2)
    found.run(1, free)
    start = found.now
    assert found.graph(collapsed, WORK, True) == (2, True)
    # ten milliseconds until it is given up, and the rest on half a core
    assert found.now - start < 3 * WORK / collapsed(1)
    assert found.run(5, collapsed, busy=True)[0] > 0.8 * collapsed(1)


def test_a_collapse_from_the_first_graph_on(machine):
    assert machine(2).run(5, collapsed, busy=True)[0] > 0.7 * collapsed(1)


def test_a_slow_start_beside_others_tries_fewer_threads(machine):
    """No better speed was seen, but that the thread is preempted tells."""
    found = machine(2)
    speed, _ = found.run(5, lambda n: 10_000 if n == 1 else 6_000, busy=True)
    assert speed > 9_000


def test_half_of_the_threads_where_others_take_some_cores(machine):
    """Sixteen threads wait for the one that has half a core; eight find a core each."""
    found = machine(16)
    found.run(10, free)
    speed, _ = found.run(20, lambda n: 0.3 * free(n) if n == 16 else free(n), busy=True)
    assert speed > 0.9 * free(8)


@pytest.mark.parametrize("busy", [False, True])
def test_all_threads_stay_where_fewer_are_slower(machine, busy):
    """Such as on a machine that has become hot, or whose memory others use."""
    found = machine(4)
    found.run(10, free)
    speed, counts = found.run(60, lambda n: 0.6 * free(n), busy=busy)
    assert speed > 0.98 * 0.6 * free(4)
    assert set(counts) <= {2, 4}
