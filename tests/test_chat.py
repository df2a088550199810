"""clex-chat: the conversation behind it, the command, and the terminal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from clex_local import ClexError, machine, open_model
from clex_local.chat.cli import main
from clex_local.chat.terminal import BucketWatch
from clex_local.machine import available_bytes
from clex_local.model_file import context_plan
from clex_local.model_file.context_plan import plan_context
from clex_local.model_file.memory import compute_bytes, kv_bytes
from clex_local.model_file.model_shape import ModelShape
from clex_local.server.plan import for_conversations
from clex_local.session.session import PromptTooLong, Sampling, Session
from clex_local.templates.builtin import CHATML, PLAIN
from helpers.chat_command import COMMAND, Pty, needs_terminal, run

pytestmark = pytest.mark.chat

GREEDY = Sampling(temp=0)
GIB = 2**30

# LLaMA-2-7B: 512 KiB of F16 cache per token.
LLAMA_7B = {
    "general.architecture": "llama",
    "llama.block_count": 32,
    "llama.embedding_length": 4096,
    "llama.feed_forward_length": 11008,
    "llama.attention.head_count": 32,
    "llama.vocab_size": 32000,
}


@pytest.fixture(scope="module")
def llm(small_buckets):
    with closing(open_model(small_buckets, ctx=1024, batch=64, threads=1, seed=0)) as llm:
        yield llm


@pytest.fixture
def session(llm):
    llm.reset()
    return Session(llm, sampling=GREEDY)


def ask(session: Session, text: str, max_tokens: int = 8) -> str:
    return "".join(session.send(text, max_tokens))


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that failed."""
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("clex-chat: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


# The conversation


def test_the_models_own_template_is_used(session):
    text, tokens = session._prompt([{"role": "user", "content": "Hi"}])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokens[0] == session.llm.token_bos()
    assert session.llm.detokenize(tokens, special=True).decode() == text


def test_a_second_turn_computes_only_what_is_new(session):
    ask(session, "Tell me about the sea.", 20)
    first = session.last
    assert (first.finish_reason, first.completion_tokens) == ("length", 20)
    assert first.prefill_tokens == first.prompt_tokens
    ask(session, "And the sky?")
    # "<|im_end|>\n<|im_start|>user\nAnd the sky?<|im_end|>\n<|im_start|>assistant\n", and the last token of the
    # answer, which was drawn but never fed.
    assert session.last.prefill_tokens <= 20
    assert session.last.prompt_tokens == first.prompt_tokens + 20 + session.last.prefill_tokens - 1


def test_an_answer_keeps_the_tokens_it_was_generated_with(session, monkeypatch):
    letters = [session.llm.tokenize(letter.encode(), add_bos=False)[0] for letter in "sea"]
    assert session.llm.tokenize(b"sea", add_bos=False) != letters
    monkeypatch.setattr(session.llm, "generate", lambda *_, **__: drawn_tokens(letters))
    assert ask(session, "Say sea", 3) == "sea"
    _, tokens = session._prompt([*session.messages, {"role": "user", "content": "Again"}])
    assert tokens[: session.used] == session._tokens
    assert session._tokens[-3:] == letters


def drawn_tokens(tokens):
    yield from tokens


def test_an_answer_cut_inside_a_character_ends_before_it(session, monkeypatch):
    face = session.llm.tokenize("🫠".encode(), add_bos=False)
    assert len(face) > 2
    hi = session.llm.tokenize(b"Hi", add_bos=False)
    monkeypatch.setattr(session.llm, "generate", lambda *_, **__: drawn_tokens([*hi, *face]))
    assert ask(session, "Smile", len(hi) + len(face) - 1) == "Hi"
    assert session._tokens[-len(hi) :] == hi
    assert session.last.completion_tokens == len(hi) + len(face) - 1


def test_long_tokens_are_written_whole(session):
    vocabulary = range(session.llm.n_vocab())
    longest = max(vocabulary, key=lambda token: len(session.llm._model.token_get_text(token)))
    text = session.llm._model.token_get_text(longest).replace("Ġ", " ").replace("Ċ", "\n")
    assert len(text) > 32
    assert session.piece(longest).decode() == text


def test_an_interrupted_answer_stays_and_the_next_turn_goes_on(session):
    stream = session.send("Tell me a long story.")
    begun = "".join(next(stream) for _ in range(5))
    stream.close()
    assert session.last.finish_reason == "interrupted"
    assert session.messages[-1] == {"role": "assistant", "content": begun}
    assert ask(session, "Go on.")
    assert session.last.prefill_tokens < 25
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2


def test_a_turn_interrupted_while_it_is_read_is_dropped(session):
    ask(session, "Hello")
    before, used = list(session.messages), session.used

    def interrupt(done, total):
        if done:
            raise KeyboardInterrupt

    session.llm.on_prefill = interrupt
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(session, "word " * 300)
    finally:
        session.llm.on_prefill = None
    assert session.last.finish_reason == "interrupted"
    assert (session.messages, session.used) == (before, used)
    assert ask(session, "And now?")
    # What was read is used when the same message comes again.
    assert session.last.prefill_tokens < 20


def test_a_bucket_switch_is_noticed_once(session):
    session.reset()
    ask(session, "Hello")
    watch = BucketWatch(session.llm)
    assert watch.change() is None
    ask(session, "word " * 300)
    line = watch.change()
    assert line.startswith("bucket 2 of 8 (t = 2, up to 512 tokens); ")
    assert "keys re-rotated in" in line
    assert watch.change() is None


def test_a_conversation_that_does_not_fit_is_refused_unchanged(session):
    ask(session, "Hello")
    before = (list(session.messages), session.used, session.llm.n_tokens)
    with pytest.raises(PromptTooLong, match=r"the prompt has 2,0\d\d tokens but the context holds 1,024") as error:
        session.send("word " * 2000)
    assert error.value.capacity == 1024
    assert (session.messages, session.used, session.llm.n_tokens) == before


def test_reset_keeps_the_system_message(llm):
    llm.reset()
    session = Session(llm, system="Be brief.", sampling=GREEDY)
    ask(session, "Hello")
    session.reset()
    assert session.messages == [{"role": "system", "content": "Be brief."}]
    assert session.used == 0
    ask(session, "Bonjour")
    assert session.last.prefill_tokens < session.last.prompt_tokens - 5


def test_seed_zero_is_a_seed(llm):
    def drawn() -> str:
        llm.reset()
        return ask(Session(llm, sampling=Sampling(temp=2.0, min_p=0)), "Write.", 12)

    assert drawn() == drawn()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "the chat template is not valid: "),
        ("{{ raise_exception('System role not supported') }}", "refused the conversation: System role not supported"),
        ("{{ ''.__class__.__mro__ }}", "refused the conversation: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "refused the conversation: "),
    ],
)
def test_a_bad_template_is_one_line(llm, template, message):
    with pytest.raises(ClexError, match=message.replace("(", r"\(")) as error:
        Session(llm, system="x", template=template)
    assert "\n" not in str(error.value)


def test_templates_of_our_own(llm):
    messages = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    turns = "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nC<|im_end|>\n"
    assert Session(llm, template=CHATML)._template.render(messages) == turns + "<|im_start|>assistant\n"
    assert Session(llm, template=PLAIN)._template.render(messages) == "AB\nC"


def test_a_model_without_template_continues_text(llm, monkeypatch):
    monkeypatch.setattr("clex_local.session.session.chat_template", lambda llm: None)
    session = Session(llm)
    assert not session.has_own_template
    assert session._template.render([{"role": "user", "content": "Once upon"}]) == "Once upon"


def test_text_that_is_not_unicode_is_refused(session):
    with pytest.raises(ClexError, match=r"^the message is not valid UTF-8 text$"):
        session.send("caf\udce9")


# Memory


def test_memory_of_a_context():
    shape = ModelShape.from_metadata(LLAMA_7B)
    assert kv_bytes(shape, 4096) == 2 * GIB
    assert kv_bytes(shape, 4000) == 2 * GIB  # rounded up to whole 256 cells
    assert kv_bytes(shape, 4096, "q8_0") == 2 * GIB * 34 // 64
    assert kv_bytes(shape, 4096, layers=8) == GIB // 2
    # Scores of 32 heads and the mask, in float32.
    assert compute_bytes(shape, 32768) > 32768 * 512 * 33 * 4
    assert compute_bytes(shape, 32768, flash_attn=True) < 256 * 2**20


def test_metadata_with_a_number_per_layer_or_another_cache():
    keys = LLAMA_7B | {"llama.attention.head_count_kv": np.array([8] * 31 + [0], dtype=np.uint32)}
    assert kv_bytes(ModelShape.from_metadata(keys), 256) == 256 * 31 * 8 * 256 * 2
    assert ModelShape.from_metadata(LLAMA_7B | {"llama.attention.kv_lora_rank": 512}) is None
    assert ModelShape.from_metadata({"general.architecture": "llama"}) is None


def test_the_context_is_what_fits():
    shape = ModelShape.from_metadata(LLAMA_7B)
    plan = plan_context(shape, 65536, available=100 * GIB)
    assert (plan.n_ctx, plan.flash_attn, plan.kv_type) == (65536, True, "f16")
    plan = plan_context(shape, 65536, available=16 * GIB, weights=4 * GIB)
    half = plan_context(shape, 65536, kv_type="f16", available=16 * GIB, weights=4 * GIB)
    assert (plan.kv_type, half.kv_type) == ("q8_0", "f16")
    assert 8192 < half.n_ctx < 16384 < plan.n_ctx < 32768
    for found in (plan, half):
        assert found.kv + found.compute <= 8 * GIB
        more = kv_bytes(shape, found.n_ctx + 256, found.kv_type)
        assert more + compute_bytes(shape, found.n_ctx + 256, flash_attn=True) > 8 * GIB
    # Weights that fill the memory still run.
    plan = plan_context(shape, 65536, available=6 * GIB, weights=8 * GIB)
    assert (plan.n_ctx, plan.kv_type) == (4096, "f16")


GEMMA3_4B = {
    "general.architecture": "gemma3",
    "gemma3.block_count": 34,
    "gemma3.embedding_length": 2560,
    "gemma3.feed_forward_length": 10240,
    "gemma3.attention.head_count": 8,
    "gemma3.attention.head_count_kv": 4,
    "gemma3.attention.key_length": 256,
    "gemma3.attention.value_length": 256,
    "gemma3.attention.sliding_window": 1024,
    "gemma3.vocab_size": 262144,
}


def test_the_context_of_a_model_with_windows_is_what_fits():
    shape = ModelShape.from_metadata(GEMMA3_4B)
    assert sum(cache.window == 1024 for cache in shape.caches) == 29
    plan = plan_context(shape, 131072, available=100 * GIB)
    assert (plan.n_ctx, plan.flash_attn, plan.kv_type) == (131072, True, "f16")
    assert plan.kv == 131072 * 34 * 4 * 512 * 2
    plan = plan_context(shape, 131072, kv_type="f16", available=8 * GIB, weights=2 * GIB)
    assert 8192 < plan.n_ctx < 32768
    with pytest.raises(ClexError, match=r"needs 1\d\.\d GiB of memory"):
        plan_context(shape, 131072, 131072, kv_type="f16", available=8 * GIB)
    # A server keeps no more of the windows than it needs.
    served = plan_context(for_conversations(shape, 1, 512), 131072, kv_type="f16", available=8 * GIB, weights=2 * GIB)
    assert served.n_ctx > 4 * plan.n_ctx


ODD_HEADS = LLAMA_7B | {"llama.attention.key_length": 128, "llama.attention.value_length": 136}


def test_flash_attention_is_for_heads_that_it_is_fast_with(monkeypatch):
    shape, odd = ModelShape.from_metadata(LLAMA_7B), ModelShape.from_metadata(ODD_HEADS)
    assert plan_context(shape, 65536, 1024, available=100 * GIB).flash_attn
    assert not plan_context(shape, 65536, 1024, flash_attn=False, available=100 * GIB).flash_attn
    assert not plan_context(odd, 65536, 1024, available=100 * GIB).flash_attn
    assert plan_context(odd, 65536, 1024, flash_attn=True, available=100 * GIB).flash_attn
    assert not plan_context(shape, 65536, 1024, kv_type="f32", available=100 * GIB).flash_attn
    assert plan_context(odd, 65536, 1024, n_gpu_layers=-1, available=100 * GIB).flash_attn
    # Without it the scores of 32 heads are there at once.
    assert not plan_context(odd, 65536, 32768, available=20 * GIB).flash_attn
    assert plan_context(odd, 65536, 32768, available=17 * GIB).flash_attn
    assert not plan_context(None, 65536, 1024).flash_attn
    monkeypatch.setenv("GGML_CLEX_ATTN_DISABLE", "1")
    assert not plan_context(shape, 65536, 1024, available=100 * GIB).flash_attn
    assert plan_context(shape, 65536, 1024, kv_type="q8_0", available=100 * GIB).flash_attn


def test_a_q8_0_cache_is_for_what_f16_cannot_hold():
    shape, odd = ModelShape.from_metadata(LLAMA_7B), ModelShape.from_metadata(ODD_HEADS)
    assert plan_context(shape, 65536, 32768, available=17 * GIB).kv_type == "f16"
    plan = plan_context(shape, 65536, 32768, available=10 * GIB)
    assert (plan.kv_type, plan.flash_attn) == ("q8_0", True)
    assert plan.kv == kv_bytes(shape, 32768, "q8_0")
    assert plan_context(shape, 65536, 1024, kv_type="q4_0", available=10 * GIB).kv_type == "q4_0"
    for other, options in [(shape, {"kv_type": "f16"}), (shape, {"flash_attn": False}), (odd, {})]:
        with pytest.raises(ClexError, match=r"\(f16 cache\)"):
            plan_context(other, 65536, 32768, **options, available=10 * GIB)


def test_layers_on_a_gpu_take_no_main_memory(monkeypatch):
    shape = ModelShape.from_metadata(LLAMA_7B)
    monkeypatch.setattr(sys, "platform", "linux")
    assert plan_context(shape, 65536, 4096, n_gpu_layers=24, available=GIB).kv == GIB // 2
    plan = plan_context(shape, 65536, 0, n_gpu_layers=-1, available=0)
    assert (plan.kv, plan.compute, plan.kv_type) == (0, 0, "f16")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert plan_context(shape, 65536, 4096, n_gpu_layers=-1, available=4 * GIB).kv == 2 * GIB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ctx": 65536, "kv_type": "f16"}, r"a context of 65,536 tokens needs 32\.\d GiB of memory \(f16 cache\) "
                                           r"but 10\.0 GiB are available; pass `ctx=\d+` or `kv_type=q4_0`$"),
        ({"ctx": 36864, "kv_type": "f16"}, r"pass `ctx=\d+` or `kv_type=q8_0`$"),
        ({"ctx": 65536}, r"needs 17\.\d GiB of memory \(q8_0 cache\) .*; pass `ctx=\d+` or `kv_type=q4_0`$"),
        ({"ctx": 65536, "kv_type": "q4_1"}, r"\(q4_1 cache\) .*; pass `ctx=\d+` or `kv_type=q4_0`$"),
        ({"ctx": 65536, "flash_attn": False}, r"needs 3\d\.\d GiB of memory \(f16 cache\) .*; pass `ctx=\d+`$"),
        ({"ctx": 65537}, "this model covers 65,536 tokens, asked for 65,537"),
        ({"kv_type": "q8_0", "flash_attn": False}, "a q8_0 cache needs flash attention"),
    ],
)  # fmt: skip
def test_a_context_that_memory_or_model_cannot_hold(options, message):
    with pytest.raises(ClexError, match=message):
        plan_context(ModelShape.from_metadata(LLAMA_7B), 65536, **options, available=10 * GIB)


def test_quantized_caches_need_whole_blocks():
    shape = ModelShape.from_metadata(LLAMA_7B | {"llama.attention.head_count": 51})
    with pytest.raises(ClexError, match="needs head sizes divisible by 32, this model has 80"):
        plan_context(shape, 4096, kv_type="q4_0")


def test_a_control_groups_limit_counts(tmp_path, monkeypatch):
    for name, text in [("limit", "3000"), ("usage", "2000"), ("memory.stat", "cache 900\ninactive_file 500\n")]:
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_cgroups", lambda: [(tmp_path, "limit", "usage", "inactive_file")])
    assert available_bytes() == 1500
    (tmp_path / "limit").write_text("max")
    assert available_bytes() > GIB // 8


# One question from a script


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "document.txt"
    path.write_text("".join(f"Line {i} of a document.\n" for i in range(70)))
    return path


def test_only_the_answer_goes_to_stdout(small_buckets):
    result = run(small_buckets, "-p", "Name a color.", "--temp", 0, "--max-tokens", 4, "--ctx", 256)
    assert result.returncode == 0
    assert result.stdout.strip()
    assert result.stdout.endswith("\n")
    assert result.stderr == "[stopped after 4 tokens, the limit of --max-tokens]\n"


def test_json(small_buckets, document):
    options = ["--system", "Be brief.", "--temp", 0, "--max-tokens", 4, "--ctx", 2048, "--kv-type", "q8_0"]
    options += ["--threads-batch", 2, "--batch", 128, "--json"]
    result = run(small_buckets, "-f", document, "-p", "How many lines?", *options)
    assert (result.returncode, result.stderr) == (0, "")
    answer = json.loads(result.stdout)
    assert answer["text"]
    assert answer["finish_reason"] == "length"
    assert answer["completion_tokens"] == 4
    assert answer["context"] == 2048
    assert answer["settings"] == {
        "flash_attn": True,
        "type_k": "q8_0",
        "type_v": "q8_0",
        "n_threads": 1,
        "n_threads_batch": 2,
        "n_batch": 128,
        "n_ubatch": 128,
    }
    assert answer["clex"]["method"] == "ntk"
    assert answer["clex"]["buckets"] == [1, 2, 3, 4, 5, 6, 7, 8]
    total = answer["prompt_tokens"] + answer["completion_tokens"]
    assert answer["clex"]["bucket"] == (total - 1) // 256 > 1
    assert answer["timings"]["prefill_tokens_per_second"] > 0


def test_standard_input_and_a_full_context(small_buckets):
    options = ["--temp", 0, "--repeat-penalty", 1.5, "--ctx", 100, "--json"]
    result = run(small_buckets, *options, stdin="Write a very long story about every ocean.\n")
    answer = json.loads(result.stdout)
    assert answer["finish_reason"] == "context"
    assert answer["prompt_tokens"] + answer["completion_tokens"] == answer["context"] == 100


def test_file_and_standard_input_make_one_prompt(small_buckets, tmp_path, monkeypatch):
    seen = {}

    def stop(*_, **__):
        raise ClexError("far enough")

    def join(parts):
        seen["parts"] = parts
        return "x"

    monkeypatch.setattr("clex_local.chat.cli.open_model", stop)
    monkeypatch.setattr("clex_local.chat.question.join", join)
    (tmp_path / "a.txt").write_text("from a file")
    arguments = [str(small_buckets), "-f", str(tmp_path / "a.txt"), "-f", "-", "-p", "question"]
    result = CliRunner().invoke(main, arguments, input="from a pipe")
    assert seen["parts"] == ["from a file", "from a pipe", "question"]
    assert result.exit_code == 1


def test_a_prompt_that_does_not_fit(small_buckets, document):
    line = error_line(run(small_buckets, "-f", document, "--ctx", 512))
    assert "tokens but the context holds 512; pass --ctx 2048 or shorten it" in line
    long = document.with_name("long.txt")
    long.write_text(document.read_text() * 6)
    line = error_line(run(small_buckets, "-f", long, "--ctx", 512))
    assert "tokens but the context holds 512; the model covers 2,048: shorten it" in line


def test_a_context_beyond_the_tables(small_buckets):
    line = error_line(run(small_buckets, "-p", "x", "--ctx", 4096))
    assert "covers 2,048 tokens (256 at t = 1, t up to 8), not the 4,096 asked for" in line


def test_a_context_beyond_the_training(smollm):
    line = error_line(run(smollm, "-p", "x", "--ctx", 32768))
    assert "was trained for 8,192 tokens and has no tables to cover the 32,768 asked for" in line
    assert "`clex-convert MODEL OUT.gguf` adds them" in line


def test_a_context_beyond_the_memory(small_buckets, monkeypatch):
    monkeypatch.setattr(context_plan, "available_bytes", lambda: 100 * 2**20)
    result = CliRunner().invoke(main, [str(small_buckets), "-p", "x", "--ctx", "2048"])
    assert result.exit_code == 1
    assert "a context of 2,048 tokens needs 141 MiB of memory (q8_0 cache) but 100 MiB are available" in result.stderr


def test_bad_input_is_one_line(small_buckets, smollm, tmp_path):
    binary = tmp_path / "binary"
    binary.write_bytes(b"text\0text")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    truncated = tmp_path / "truncated.gguf"
    with open(smollm, "rb") as whole:
        truncated.write_bytes(whole.read(4_000_000))

    def failure(*arguments: object) -> str:
        result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        return result.stderr.removeprefix("clex-chat: error: ").rstrip()

    assert (
        failure(tmp_path / "none.gguf", "-p", "x")
        == f"{tmp_path}/none.gguf: cannot be read (No such file or directory)"
    )
    assert "not a GGUF file" in failure(latin, "-p", "x")
    assert "truncated GGUF file" in failure(truncated, "-p", "x")
    assert failure(small_buckets, "-f", tmp_path / "none.txt") == f"{tmp_path}/none.txt: No such file or directory"
    assert failure(small_buckets, "-f", binary) == f"{binary}: a binary file, not text"
    assert failure(small_buckets, "-p", "") == "the prompt is empty"


@pytest.mark.parametrize(
    "arguments",
    [["-p", "x"], ["m", "--kv-type", "q9"], ["m", "--ctx", "many"], ["m", "--top-p", "2"], ["m", "--none"],
     ["m", "-p", "x", "--system", "y", "--chat-template", "plain"]],
)  # fmt: skip
def test_wrong_usage_is_one_line(arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("clex-chat: error: ")
    assert result.stderr.count("\n") == 1


def test_ctrl_c_ends_a_question_with_what_there_is(small_buckets):
    command = [*COMMAND, str(small_buckets), "-p", "Write a very long story.", "--temp", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        begun = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert len(begun) == 20
    assert rest.endswith("\n")
    assert errors.startswith("[stopped after ")
    assert errors.count("\n") == 1


def test_a_reader_that_leaves_is_no_error(small_buckets):
    command = [*COMMAND, str(small_buckets), "-p", "Write a very long story.", "--temp", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(5)
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(timeout=20)
    assert errors == b""


# The terminal


@needs_terminal
def test_a_chat_in_a_terminal(small_buckets, tmp_path):
    note = tmp_path / "a note.txt"
    note.write_text("The secret number is 4711.\n" * 30)
    pty = Pty(small_buckets, "--ctx", "2048", "--max-tokens", "150", XDG_STATE_HOME=str(tmp_path / "state"))
    chat = pty.chat
    pty.expect("2,048 tokens of context · 45 MiB f16 cache")
    pty.prompt(r" 0 of 2,048 tokens  ·  bucket 1 of 8 \(t = 1, up to 256 tokens\)")
    for command, answer in [
        ("/help", "/file PATH.*?Ctrl-C stops an answer"),
        ("/nonsense", "unknown command /nonsense; /help lists them"),
        ("/file", "/file needs a path"),
        (f"/file {tmp_path}/none", "none: No such file or directory"),
        ("/stats", "context +0 of 2,048 tokens.*?switches +0"),
    ]:
        chat.send(f"{command}\r")
        pty.expect(answer)
        pty.prompt(" 0 of 2,048 tokens")

    chat.send("Write a long story about the sea.\r")
    pty.expect(r"\n[^\x1b\r\n]{40,}")  # nothing but an answer is that long without colours
    chat.sendintr()
    pty.expect(r"\[stopped after \d+ tokens\]")
    pty.prompt(r" [1-9]\d* of 2,048 tokens")
    chat.send("Say\\\rhello.\r")  # two lines, one message
    pty.prompt(r" [1-9]\d* of 2,048 tokens")

    chat.send(f'/file "{note}"\r')
    pty.expect(r"a note.txt: \d+ tokens, sent with your next message")
    pty.prompt(r"a note.txt \(\d+ tokens\)")
    chat.send("What is the secret number?\r")
    pty.expect(r"bucket [23] of 8 \(t = [23], up to (512|768) tokens\); \d+ keys re-rotated in \d+ ms")
    pty.prompt(r"bucket [23] of 8")
    chat.send("/stats\r")
    pty.expect(r"tables +ntk; t = 1: 256.*?in use +bucket [23].*?switches +[12]; .*?answers +\d+ tokens")
    pty.prompt(r"bucket [23] of 8")

    chat.send("/reset\r")
    pty.expect("the conversation is forgotten")
    pty.prompt(" 0 of 2,048 tokens  ·  bucket 1 of 8")
    chat.sendintr()
    pty.expect("/quit or Ctrl-D leaves")
    pty.prompt(" 0 of 2,048 tokens")
    chat.send("/quit\r")
    assert pty.close() == 0
    history = tmp_path / "state" / "clex-local" / "chat_history"
    assert "+Say\n+hello.\n" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


@needs_terminal
def test_ctrl_c_while_a_prompt_is_read(small_buckets, tmp_path):
    pty = Pty(small_buckets, "--ctx", "2048", "--batch", "16", "--max-tokens", "3", XDG_STATE_HOME=str(tmp_path))
    pty.prompt(" 0 of 2,048 tokens")
    (tmp_path / "long.txt").write_text("word " * 1900)
    pty.chat.send(f"/file {tmp_path}/long.txt\r")
    pty.prompt(r"long.txt \(1,901 tokens\)")
    pty.chat.send("Well?\r")
    pty.expect(r"reading 1,9\d\d tokens.* tok/s")
    pty.chat.sendintr()
    pty.expect("stopped while reading: the message was not sent; the file still waits for your next message")
    pty.prompt(r" 0 of 2,048 tokens .*long.txt \(1,901 tokens\)")
    pty.chat.send("/reset\r")
    pty.prompt(" 0 of 2,048 tokens")
    pty.chat.send("Hello\r")
    pty.expect("limit of --max-tokens")
    pty.prompt(r" [1-9]\d* of 2,048 tokens")
    pty.chat.sendeof()
    assert pty.close() == 0


@needs_terminal
def test_a_terminal_that_cannot_edit(small_buckets):
    pty = Pty(small_buckets, "--ctx", "256", "--max-tokens", "3", TERM="dumb")
    pty.expect("\n> ")
    pty.chat.send("Hello\r")
    pty.expect("limit of --max-tokens")
    pty.expect("\n> ")
    pty.chat.sendeof()
    assert pty.close() == 0


@needs_terminal
def test_a_history_that_cannot_be_written(small_buckets, tmp_path):
    (tmp_path / "file").touch()
    pty = Pty(small_buckets, "--ctx", "256", XDG_STATE_HOME=str(tmp_path / "file"))
    pty.prompt(" 0 of 256 tokens")
    pty.chat.send("/stats\r")
    pty.prompt(" 0 of 256 tokens")
    pty.chat.sendeof()
    assert pty.close() == 0


def test_attachments_and_the_status_line(session, tmp_path):
    from clex_local.chat.conversation import Chat
    from clex_local.chat.terminal import Terminal

    chat = Chat(Terminal(session, quiet=True), "name", "cache")
    assert chat.status() == " 0 of 1,024 tokens  ·  bucket 1 of 8 (t = 1, up to 256 tokens)"
    assert "settings   flash attention, f16 cache, 1 thread, 64 tokens at once\n" in chat.stats()
    (tmp_path / "a.txt").write_text("word " * 20)
    chat.attach(str(tmp_path / "a.txt"))
    assert chat.status().endswith("  ·  a.txt (21 tokens)")
    chat.reset("")
    assert not chat.attachments
    with pytest.raises(ClexError, match="No such file"):
        chat.attach(str(tmp_path / "none"))
    (tmp_path / "empty").touch()
    with pytest.raises(ClexError, match="an empty file"):
        chat.attach(str(tmp_path / "empty"))


def test_a_model_without_tables_has_a_status_too(session):
    from clex_local.chat.conversation import Chat
    from clex_local.chat.terminal import Terminal

    plain = SimpleNamespace(clex=None, settings=session.llm.settings, n_ctx=lambda: 128, input_ids=[0] * 128)
    chat = Chat(Terminal(session, quiet=True), "name", "cache")
    session.llm = plain
    assert chat.status() == " 0 of 128 tokens"
    assert "none: the model runs inside the context it was trained for" in chat.stats()
