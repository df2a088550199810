"""Several threads on one model: each gets the answer that it would get alone, and none waits for ever."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from llama_cpp import LlamaRAMCache

from clex_local import ClexError, Llama
from clex_local.runtime.turn import StreamError, Turn
from helpers.random_gguf import make_model

pytestmark = pytest.mark.runtime

PROMPTS = [f"thread {i} says {i} " * 6 for i in range(4)]
WAIT = 60  # seconds; no test takes so long unless it hangs


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("turn") / "model.gguf")


@pytest.fixture
def llm(path):
    # "exact": what an earlier prompt left in the cache changes no answer
    with Llama(path, n_ctx=256, n_threads=1, verbose=False, embedding=True, prefix_reuse="exact") as model:
        yield model


def complete(llm, prompt) -> str:
    return llm.create_completion(prompt, max_tokens=12, temperature=0)["choices"][0]["text"]


def stream(llm, prompt, max_tokens=12):
    return llm.create_completion(prompt, max_tokens=max_tokens, temperature=0, stream=True)


def text(parts) -> str:
    return "".join(part["choices"][0]["text"] for part in parts)


def saved(llm, prompt):
    with llm._turn.take():
        llm.reset()
        llm.eval(llm.tokenize(prompt.encode()))
        return llm.save_state()


WORK = {
    "complete": complete,
    "stream": lambda llm, prompt: text(stream(llm, prompt)),
    "generate": lambda llm, prompt: [
        token for token, _ in zip(llm.generate(llm.tokenize(prompt.encode()), temp=0), range(12), strict=False)
    ],
    "embed": lambda llm, prompt: llm.embed([prompt, prompt[:9]]),
    "chat": lambda llm, prompt: llm.create_chat_completion(
        [{"role": "user", "content": prompt}], temperature=0, max_tokens=12
    )["choices"][0]["message"]["content"],
    "chat, stream": lambda llm, prompt: [
        part["choices"][0]["delta"]
        for part in llm.create_chat_completion(
            [{"role": "user", "content": prompt}], temperature=0, max_tokens=12, stream=True
        )
    ],
    "chat, biased": lambda llm, prompt: llm.create_chat_completion(
        [{"role": "user", "content": prompt}], temperature=0, max_tokens=4, logit_bias={270: 1e3}
    )["choices"][0]["message"]["content"],
    "state": lambda llm, prompt: saved(llm, prompt).n_tokens,
}


def test_threads_that_do_the_same_or_other_things_get_their_own_answers(llm):
    jobs = [(name, prompt) for prompt in PROMPTS for name in WORK]
    expected = [WORK[name](llm, prompt) for name, prompt in jobs]
    llm.set_cache(LlamaRAMCache())
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(lambda job: WORK[job[0]](llm, job[1]), jobs)) == expected


def test_stream_can_be_taken_up_by_any_thread(llm):
    """As web frameworks do, which run each step in a thread of a pool."""
    expected = complete(llm, PROMPTS[0])
    parts = stream(llm, PROMPTS[0])
    found = []
    while True:
        with ThreadPoolExecutor(1) as pool:
            part = pool.submit(next, parts, None).result(WAIT)
        if part is None:
            break
        found.append(part)
    assert text(found) == expected


def other_thread(work):
    """Start work in another thread; returns what waits for its result."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


def test_a_stream_is_finished_before_another_thread_has_its_turn(llm):
    expected = complete(llm, PROMPTS[0]), complete(llm, PROMPTS[1])
    parts = stream(llm, PROMPTS[0])
    found = [next(parts)]
    future = other_thread(lambda: complete(llm, PROMPTS[1]))
    for part in parts:
        found.append(part)
        assert part["choices"][0]["finish_reason"] or not future.done()
    assert (text(found), future.result(WAIT)) == expected


@pytest.mark.parametrize("end", ["close", "drop", "cycle"])
def test_a_stream_that_is_closed_or_dropped_lets_others_go_on(llm, end):
    parts = stream(llm, PROMPTS[0])
    next(parts)
    future = other_thread(lambda: complete(llm, PROMPTS[1]))
    if end == "close":
        parts.close()
    elif end == "cycle":
        holder = [parts]
        holder.append(holder)
        del holder, parts
        gc.collect()
    else:
        del parts
    assert future.result(WAIT) == complete(llm, PROMPTS[1])


def test_a_stream_that_is_left_lets_others_go_on_after_a_while(llm, monkeypatch):
    monkeypatch.setattr(Turn, "idle_timeout", 0.05)
    expected = complete(llm, PROMPTS[1])
    parts = stream(llm, PROMPTS[0])
    next(parts)
    assert other_thread(lambda: complete(llm, PROMPTS[1])).result(WAIT) == expected
    with pytest.raises(StreamError, match="another call has used the model"):
        next(parts)
    assert complete(llm, PROMPTS[1]) == expected


CHANGES = {
    "complete": lambda llm: complete(llm, "b"),
    "eval": lambda llm: llm.eval([5]),
    "reset": lambda llm: llm.reset(),
    "embed": lambda llm: llm.embed("b"),
    "stream": lambda llm: next(stream(llm, "b")),
    "load_state": lambda llm: llm.load_state(llm.save_state()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", ["stream", "generate"])
def test_a_stream_does_not_go_on_with_the_text_of_another_call(llm, change, kind):
    """The thread that left it need not wait for itself."""
    left = stream(llm, PROMPTS[0]) if kind == "stream" else llm.generate([5, 6, 7], temp=0)
    next(left)
    change(llm)
    with pytest.raises(StreamError) as caught:
        next(left)
    assert isinstance(caught.value, ClexError)
    with pytest.raises(StopIteration):
        next(left)


def test_what_changes_nothing_disturbs_no_stream(llm):
    expected = complete(llm, PROMPTS[0])
    parts = stream(llm, PROMPTS[0])
    found = [next(parts)]
    state = llm.save_state()
    other = other_thread(lambda: (llm.save_state().n_tokens, llm.tokenize(b"a"), llm.n_ctx(), llm.settings))
    assert other.result(WAIT)[0] == state.n_tokens
    assert (text([*found, *parts]), llm.detokenize([5])) == (expected, llm.detokenize([5]))
    llm.load_state(state)


class Queue(threading.Condition):
    """Tells when a call begins to wait."""

    def __init__(self):
        super().__init__()
        self.waits = threading.Event()

    def wait(self, timeout=None):
        self.waits.set()
        return super().wait(timeout)


def stream_with_a_call(llm, call):
    """Tokens of a stream in whose third step another thread begins to wait for the turn, and what the call returns."""
    llm._turn._changed = queue = Queue()
    calls, tokens = [], []

    def start(ids, logits):
        if len(tokens) == 2:
            calls.append(other_thread(call))
            assert queue.waits.wait(WAIT)
        return len(tokens) == 40

    def run():
        with suppress(StreamError):
            for token in llm.generate([5, 6, 7], temp=0, stopping_criteria=start):
                tokens.append(token)

    other_thread(run).result(WAIT)
    return tokens, calls[0].result(WAIT)


def test_a_call_that_no_stream_keeps_waiting_comes_before_the_next_step(path):
    with Llama(path, n_ctx=256, n_threads=1, verbose=False) as llm:
        tokens, state = stream_with_a_call(llm, llm.save_state)
        assert (len(tokens), state.n_tokens) == (40, 3 + 2)
    llm = Llama(path, n_ctx=256, n_threads=1, verbose=False)
    tokens, _ = stream_with_a_call(llm, llm.close)
    assert len(tokens) == 3


def test_a_call_inside_one_that_waits_does_not_wait_for_it():
    """That of a signal's handler, say."""
    turn, order = Turn(), []

    class Interrupted(Queue):
        def wait(self, timeout=None):
            if self.waits.is_set():
                return super().wait(timeout)
            super().wait(0)
            with turn.take(reading=True):
                order.append("inner")
            return False

    turn._changed = queue = Interrupted()

    def wait():
        with turn.take():
            order.append("outer")

    with turn.take():
        future = other_thread(wait)
        assert queue.waits.wait(WAIT)
    future.result(WAIT)
    assert order == ["inner", "outer"]


def test_a_callback_uses_the_model_that_calls_it(llm):
    """Logits processors, stopping criteria and the prefill's callback run inside a call."""
    seen = []

    def stop(tokens, logits):
        seen.append(len(llm.tokenize(llm.detokenize(tokens.tolist()))) + llm.save_state().n_tokens)
        return len(seen) == 4

    tokens = list(llm.generate([5, 6], temp=0, stopping_criteria=stop))
    assert len(tokens) == 3


def test_a_callback_that_changes_the_cache_ends_a_stream_that_was_left(llm):
    """Also inside a call that only reads."""
    parts = stream(llm, PROMPTS[0])
    next(parts)
    with llm._turn.take(reading=True):
        llm.save_state()
        llm.reset()
    with pytest.raises(StreamError):
        next(parts)


def test_an_error_gives_the_turn_back(llm):
    with pytest.raises(ClexError):
        llm.eval([5] * 1000)
    with pytest.raises(ClexError):
        next(llm.generate([10**6]))

    def fail(done, total):
        raise ZeroDivisionError

    llm.on_prefill = fail
    small = stream(llm, "a")
    next(small)
    llm.on_prefill = None
    assert other_thread(lambda: small.close()).result(WAIT) is None
    assert other_thread(lambda: complete(llm, "a")).result(WAIT) == complete(llm, "a")


def test_two_threads_take_turns_at_single_calls(llm):
    """Nothing but ``eval`` and ``reset``: no call is inside another."""
    inside = []
    lengths = set()

    def count(done, total):
        inside.append(threading.get_ident())
        lengths.add(len(set(inside[-(done // 16 + 1) :])))

    llm.n_batch = 16
    llm.on_prefill = count

    def work():
        for _ in range(5):
            with llm._turn.take():
                llm.reset()
                llm.eval(list(range(3, 100)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert lengths == {1}
