"""How long a prompt takes: expected from what was measured, corrected while it is read, said before a long one."""

from __future__ import annotations

import json
import re
from contextlib import closing

import pytest

from clex_local import open_model
from clex_local.chat.attention_speed import measured_per_depth
from clex_local.chat.reading_speed import (
    Growth,
    Measured,
    ReadingSpeed,
    attention_share,
    remember,
    remembered,
    speeds_file,
)
from clex_local.chat.reading_time import ReadingTime, readable_time, speed_key
from clex_local.model_file.model_shape import ModelShape
from helpers.chat_command import Pty, run
from helpers.random_gguf import make_model

pytestmark = pytest.mark.chat

TRUE = ReadingSpeed(0.002, 6e-7)  # seconds; at 4,096 tokens a token takes twice what the first one takes
SHARE = TRUE.per_depth / TRUE.base


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CLEX_STORE", "0")  # texts are read each time
    return tmp_path / "cache"


def measured(end: int, speed: ReadingSpeed = TRUE, batch: int = 512) -> Measured:
    """What a prompt of so many tokens shows."""
    found = Measured()
    for start in range(0, end, batch):
        found.add(start, min(start + batch, end), speed.seconds(start, min(start + batch, end)))
    return found


@pytest.mark.parametrize("end", [512, 2048, 8192, 32768])
@pytest.mark.parametrize("length", [2048, 8192, 32768])
def test_cost_grows_with_depth(end, length):
    expected = measured(end).speed(Growth(SHARE))
    assert expected.seconds(0, length) == pytest.approx(TRUE.seconds(0, length), rel=0.02)


@pytest.mark.parametrize("wrong", [0.0, 0.4, 2.5])
def test_what_was_measured_at_depth_outweighs_the_shape(wrong):
    """The shape may be unknown, and a processor better or worse at attention than at weights."""
    for end in (8192, 32768):
        expected = measured(end).speed(Growth(SHARE * wrong))
        assert expected.seconds(0, 32768) == pytest.approx(TRUE.seconds(0, 32768), rel=0.25)


def test_share_of_attention_is_that_of_the_shape(smollm):
    from clex_local.model_file.gguf_file import GGUFFile

    with GGUFFile(smollm) as file:
        # As was measured: 2.7e-4 with tile registers, 9.4e-4 without.
        assert attention_share(ModelShape.from_metadata(file)) == pytest.approx(5e-4, rel=0.1)
    assert attention_share(None) == 0


def test_noise_does_not_make_deep_tokens_cheap():
    found = Measured()
    found.add(0, 512, 2.0)
    found.add(8192, 8704, 1.0)
    assert found.speed(Growth(SHARE)).seconds(0, 32768) >= 32768 * 1.5 / 512 * 0.99
    assert Measured().speed(Growth(SHARE)) is None
    found = Measured()
    for seconds in (0.0, -1.0, float("inf"), float("nan")):
        found.add(0, 512, seconds)
    found.add(5, 5, 1.0)
    assert found.speed(Growth(SHARE)) is None


class Machine:
    """A model that reads prompts at a speed of our choice: its clock goes by the tokens that were read."""

    def __init__(self, llm, speed: ReadingSpeed, alone: float | None = None):
        self.llm, self.speed, self.seconds = llm, speed, 0.0
        self.reading = ReadingTime(llm, lambda: self.seconds, lambda llm, shape: alone)
        self.seen: list[tuple[float | None, float]] = []  # what was expected, and how long it then took

    def read(self, n_tokens: int) -> list[tuple[int, float | None, float]]:
        """Read a prompt: after each batch, tokens done, seconds expected and needed for the rest."""
        start, seen = self.llm.n_tokens, []

        def update(done: int, total: int) -> None:
            assert self.llm.n_tokens == start + done
            if done:
                self.seconds += self.speed.seconds(start + self.last, start + done)
            self.last = done
            self.reading.update(done, total)
            seen.append((done, self.reading.left(), self.speed.seconds(start + done, start + total)))

        self.llm.on_prefill = update
        try:
            self.llm.eval([5] * n_tokens)
        finally:
            self.llm.on_prefill = None
            self.reading.remember()
        return seen


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = make_model(tmp_path_factory.mktemp("model") / "tiny.gguf", original=4096, n_buckets=2, n_layer=1)
    with closing(open_model(path, ctx=8192, batch=512, threads=1)) as llm:
        yield llm


@pytest.fixture
def machine(llm):
    llm.reset()
    share = attention_share(ModelShape.from_metadata(file_of(llm)))
    return Machine(llm, ReadingSpeed(0.002, 0.002 * share))


def file_of(llm):
    from clex_local.model_file.gguf_file import GGUFFile

    return GGUFFile(llm.model_path)


def test_first_prompt_is_expected_from_its_first_batches(machine):
    seen = machine.read(6000)
    assert seen[0][:2] == (0, None)
    for done, expected, needed in seen[1:-1]:
        assert expected == pytest.approx(needed, rel=0.1), done
    assert seen[-1][1] == 0


# Milliseconds of a token of SmolLM2 (Q4_1) in each 512 of a prompt: one thread of a Zen 4, F16 cache, its own CPU time.
RECORDED = [1.215, 1.681, 2.081, 2.629, 3.042, 3.388, 3.902, 4.364, 4.898, 5.378,
            5.856, 6.358, 7.019, 7.254, 7.697, 8.121, 8.671, 9.021, 9.496, 10.202]  # fmt: skip
ALONE = 9.2e-7  # seconds that `measured_per_depth` found there


class Recorded:
    """Speeds of a machine that were recorded; behind them they go on as they did."""

    def __init__(self, first: float = 1.0):
        self.costs = [first * RECORDED[0], *RECORDED[1:]]

    def cost(self, batch: int) -> float:
        slope = (self.costs[-1] - self.costs[9]) / (len(self.costs) - 10)
        behind = max(0, batch - len(self.costs) + 1)
        return self.costs[min(batch, len(self.costs) - 1)] + slope * behind

    def seconds(self, start: int, end: int) -> float:
        return sum(self.cost(i // 512) * min(512, end - i) / 1000 for i in range(start, end, 512))


@pytest.mark.parametrize("off", [0.85, 1.0, 1.15])
@pytest.mark.parametrize("length", [2048, 8192, 32768])
def test_first_estimate_is_within_a_quarter(length, off):
    """After two batches of a model that never read anything, the first of which had its weights to read from disk."""
    took, found = Recorded(first=4), Measured()
    found.add(512, 1024, took.seconds(512, 1024))
    expected = found.speed(Growth(2.6e-4, off * ALONE)).seconds(1024, length)
    assert expected == pytest.approx(took.seconds(1024, length), rel=0.25)


@pytest.mark.parametrize("read", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("length", [2048, 8192, 32768])
def test_later_estimate_is_within_a_quarter(length, read):
    """Whatever was read before, more or less."""
    found = Measured()
    for start in range(512, read, 512):
        found.add(start, start + 512, Recorded().seconds(start, start + 512))
    for alone in (0.85 * ALONE, 1.15 * ALONE):
        expected = found.speed(Growth(2.6e-4, alone)).seconds(0, length)
        assert expected == pytest.approx(Recorded().seconds(0, length), rel=0.25)


def test_short_prompts_are_expected_as_exactly_as_long_ones():
    """What deep tokens are off by, in seconds, is more than all that shallow ones cost."""
    found = Measured()
    for start in range(0, 32768, 512):
        noise = 1.06 if start // 512 % 3 else 0.9
        found.add(start, start + 512, noise * TRUE.seconds(start, start + 512))
    for length in (1024, 2048, 32768):
        assert found.speed(Growth(SHARE)).seconds(0, length) == pytest.approx(TRUE.seconds(0, length), rel=0.1)


def test_time_left_is_what_was_said_before(llm):
    """The first estimate, and those while it reads, are of one and the same end."""
    llm.reset()
    seen = Machine(llm, Recorded(first=4), ALONE).read(8000)
    assert seen[1][1] is not None
    for done, expected, needed in seen[2:-1]:
        assert expected == pytest.approx(needed, rel=0.25), done


def test_attention_alone_is_measured_where_nothing_was_read_at_depth(llm):
    asked = []

    def attention(llm, shape):
        asked.append(shape.layers)
        return 1e-9

    llm.reset()
    reading = ReadingTime(llm, attention=attention)
    for total, times in ((512, 0), (4096, 1), (8192, 1)):
        reading.update(0, total)
        assert len(asked) == times
    remember(speed_key(llm), measured(8192))
    other = ReadingTime(llm, attention=attention)
    other.update(0, 8192)
    assert asked == [1]


@pytest.mark.parametrize("options", [{}, {"flash_attn": False}, {"kv_type": "q8_0"}, {"kv_type": "f32"}])
def test_attention_alone_is_measured_for_every_cache_and_number_of_layers(tmp_path, options):
    """By the library, which computes it beside the model: the context is as it was."""
    for n_layer in (1, 4):
        path = make_model(tmp_path / f"{n_layer}.gguf", original=4096, n_buckets=2, n_layer=n_layer)
        with closing(open_model(path, ctx=1024, threads=1, store=False, **options)) as llm:
            tokens = llm.n_tokens
            alone = measured_per_depth(llm, ModelShape.from_metadata(file_of(llm)))
            assert alone is not None
            assert llm.n_tokens == tokens
            assert 0 < alone < 1e-3
            llm.eval([5] * 300)


def test_attention_of_a_shape_that_cannot_be_is_not_measured(llm):
    from clex_local.library.llama_clex_attention import Attention, attention_time

    good = (8, 4, 64, 64, 1, 1)
    assert attention_time(llm.ctx, Attention(*good), 32, 256) > 0
    for wrong in ((8, 3, 64, 64, 1, 1), (0, 1, 64, 64, 1, 1), (8, 4, 0, 64, 1, 1), (8, 4, 64, 64, 999, 1),
                  (8, 4, 40, 64, 8, 8), (8, -4, 64, 64, 1, 1)):  # fmt: skip
        assert attention_time(llm.ctx, Attention(*wrong), 32, 256) == 0
    for tokens, depth in ((0, 256), (32, 0), (-1, 256), (32, 100)):
        assert attention_time(llm.ctx, Attention(*good), tokens, depth) == 0


def test_later_prompts_are_expected_before_they_are_read(machine):
    machine.read(3000)
    machine.llm.reset()
    (_, expected, needed), *_ = machine.read(5000)
    assert expected == pytest.approx(needed, rel=0.1)
    (_, expected, needed), *_ = machine.read(3000)  # after what was there
    assert expected == pytest.approx(needed, rel=0.1)
    assert needed > machine.speed.seconds(0, 3000) * 1.5


def test_slower_machine_than_before_is_noticed_while_it_reads(machine):
    machine.read(3000)
    machine.llm.reset()
    machine.speed = ReadingSpeed(machine.speed.base * 3, machine.speed.per_depth * 3)
    seen = machine.read(6000)
    assert seen[0][1] == pytest.approx(seen[0][2] / 3, rel=0.1)
    for done, expected, needed in seen[5:-1]:
        assert expected == pytest.approx(needed, rel=0.25), done


def test_time_passes_between_batches(machine):
    machine.read(2048)
    machine.reading.update(0, 4096)
    whole, batch = machine.reading.left(), machine.reading.speed.seconds(2048, 2048 + machine.llm.n_batch)
    machine.seconds += batch / 2
    assert machine.reading.left() == pytest.approx(whole - batch / 2)
    machine.seconds += batch / 2
    assert machine.reading.left() == pytest.approx(whole - batch)


def test_a_batch_that_is_late_is_not_said_to_be_nearly_over(machine):
    machine.read(2048)
    batch = machine.llm.n_batch
    for done, total in [(0, 2048), (2048 - batch, 2048)]:  # as on a machine that has become busy at once
        machine.reading.update(done, total)
        expected = machine.reading.left()
        under_way = machine.reading.speed.seconds(2048 + done, 2048 + done + batch)
        seen = []
        for part in (1.0, 1.5, 2.0, 4.0):
            machine.seconds = machine.reading._time + part * under_way
            seen.append(machine.reading.left())
        assert seen[0] == pytest.approx(expected - under_way, abs=1e-6)
        assert seen == sorted(seen)
        # What was late by the time of a batch is not over in a moment.
        assert seen[2] >= under_way * 0.99
        assert seen[2] < 2 * expected + under_way
    machine.reading.update(2048, 2048)
    assert machine.reading.left() == 0


def test_speeds_are_remembered_for_each_way_to_run_a_model(folder, llm, tmp_path):
    remember("a", measured(4096))
    remember("b", measured(512))
    assert remembered("a").speed(Growth(SHARE)).base == pytest.approx(TRUE.base, rel=0.01)
    assert len(remembered("b").steps) == 1
    assert remembered("c").steps == {}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert speeds_file().stat().st_mode & 0o777 == 0o600
    assert json.loads(speeds_file().read_text())["speeds"]["a"]["depths"]["1024"][0] == 1024
    with closing(open_model(llm.model_path, ctx=512, batch=512, threads=2)) as other:
        keys = [speed_key(llm), speed_key(other)]
    with closing(open_model(llm.model_path, ctx=512, batch=512, threads=1, kv_type="q8_0")) as other:
        keys.append(speed_key(other))
    assert len(set(keys)) == 3


def test_what_was_remembered_follows_a_machine_that_changes():
    for _ in range(50):
        remember("a", measured(8192))
    slow = ReadingSpeed(TRUE.base * 2, TRUE.per_depth * 2)
    for _ in range(20):
        remember("a", measured(8192, slow))
    assert remembered("a").speed(Growth(SHARE)).seconds(0, 8192) == pytest.approx(slow.seconds(0, 8192), rel=0.05)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "nonsense", "\x00", "[" * 100_000, '{"version": 2, "speeds": {"a": {}}}', '{"version": 1}',
     '{"version": 1, "speeds": []}', '{"version": 1, "speeds": {"a": 5}}',
     '{"version": 1, "speeds": {"a": {"depths": {"x": [1, 2, 3], "0": "abc", "1024": [1, 2], "2048": [NaN, 1, 1],'
     ' "3072": [1, 1, -1], "4096": [1, 1, 1e999], "5120": [1, 1, 1e-200], "6144": [1e-200, 1, 1], "1e9": null}}}}'],
)  # fmt: skip
def test_damaged_file_is_as_none_and_is_written_anew(folder, text):
    folder.mkdir()
    speeds_file().write_text(text)
    assert remembered("a").steps == {}
    remember("a", measured(2048))
    assert len(remembered("a").steps) == 2


def test_speeds_that_cannot_be_kept_are_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLEX_CACHE", str(tmp_path / "file"))
    remember("a", measured(2048))
    assert remembered("a").steps == {}


def test_durations_are_as_precise_as_an_estimate():
    told = {0.2: "1 s", 42: "42 s", 62: "1 min", 100: "1 min 40 s", 598: "10 min", 1500: "25 min", 11400: "3 h 10 min"}
    assert {seconds: readable_time(seconds) for seconds in told} == told


@pytest.fixture
def question(llm, tmp_path):
    """A command that reads some 3,000 tokens, one a letter."""
    document = tmp_path / "long.txt"
    document.write_text("abcdefghij" * 300)
    options = ["--ctx", "4096", "--batch", "128", "--max-tokens", "2", "--chat-template", "plain", "--temp", "0"]
    return [llm.model_path, "-f", document, *options]


@pytest.fixture
def slow(question):
    """The same, remembered as reading 10 tokens a second."""
    assert run(*question).returncode == 0
    data = json.loads(speeds_file().read_text())
    ((key, entry),) = data["speeds"].items()
    assert "threads 1, cache f16" in key
    assert sum(tokens for tokens, _, _ in entry["depths"].values()) > 2500
    entry["depths"] = {step: [1000, depth, 0.1] for step, (_, depth, _) in entry["depths"].items()}
    speeds_file().write_text(json.dumps(data))
    return question


def test_long_reading_is_announced(slow):
    line, *rest = run(*slow).stderr.splitlines()
    found = re.fullmatch(r"reading 3,0\d\d tokens in bucket 1 of 2 \(t = 1, up to 4,096 tokens\): about (.*)", line)
    assert found[1][:5] in ("4 min", "5 min")
    assert rest == ["[stopped after 2 tokens, the limit of --max-tokens]"]
    # Of what it was, it is believed no more.
    assert sum(cost for _, _, cost in next(iter(remembered_depths().values())).values()) < 0.3


def remembered_depths():
    return {key: entry["depths"] for key, entry in json.loads(speeds_file().read_text())["speeds"].items()}


def test_long_reading_at_a_speed_that_is_not_known_is_announced_once(question):
    model, _, document, *options = question
    document.write_text("abcdefghij" * 430)
    options[1] = "8192"
    first, *rest = run(model, "-f", document, *options).stderr.splitlines()
    assert re.fullmatch(r"reading 4,3\d\d tokens in bucket 2 .*; how long that takes is measured first", first)
    assert rest == run(model, "-f", document, *options).stderr.splitlines()


def test_short_reading_is_not_announced(question):
    for _ in range(2):
        assert run(*question).stderr == "[stopped after 2 tokens, the limit of --max-tokens]\n"


def test_json_says_nothing_else(slow):
    assert run(*slow, "--json").stderr == ""


def test_bar_of_a_terminal_has_the_time_that_is_left(slow, tmp_path):
    model, _, document, *options = slow
    pty = Pty(model, *options, XDG_STATE_HOME=str(tmp_path))
    pty.prompt(" 0 of 4,096 tokens")
    pty.chat.send(f"/file {document}\r")
    pty.prompt("long.txt")
    pty.chat.send("Well?\r")
    pty.expect(r"reading 3,0\d\d tokens in bucket 1 of 2 \(t = 1, up to 4,096 tokens\): about [45] min")
    pty.prompt(r" 3,0\d\d of 4,096 tokens")
    pty.chat.sendeof()
    assert pty.close() == 0


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_bar_has_the_time_that_is_left_in_any_window(width):
    from io import StringIO

    from rich.console import Console

    from clex_local.chat.terminal import PrefillBar

    console = Console(file=StringIO(), width=width, force_terminal=True)
    with PrefillBar(console, lambda: 350.0) as bar:
        bar._progress.start()
        bar.update(0, 104_096)
        bar.update(50_000, 104_096)
        with console.capture() as shown:
            console.print(bar._progress.get_renderable())
    assert "5 min 50 s left" in shown.get()
    assert ("tok/s" in shown.get()) == (width >= 60)


def test_bar_counts_down(machine):
    from io import StringIO

    from rich.console import Console

    from clex_local.chat.terminal import PrefillBar

    machine.read(2048)
    machine.reading.update(0, 4096)
    console = Console(file=StringIO(), width=100, force_terminal=True)
    with PrefillBar(console, machine.reading.left) as bar:
        bar.update(0, 4096)
        machine.seconds += machine.reading.speed.seconds(2048, 2048 + machine.llm.n_batch) / 2
        left = readable_time(machine.reading.left())
        with console.capture() as shown:
            console.print(bar._progress.get_renderable())
        bar.update(4096, 4096)
        machine.reading.update(4096, 4096)
        with console.capture() as at_its_end:
            console.print(bar._progress.get_renderable())
    assert "reading 4,096 tokens" in shown.get()
    assert f"{left} left" in shown.get()
    assert "4,096 tokens read, now writing" in at_its_end.get()
    assert " left" not in at_its_end.get()
