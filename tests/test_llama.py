"""What an application sees of ``clex_local.Llama``."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from contextlib import closing

import llama_cpp
import numpy as np
import pytest

from clex_local import ClexError, Llama, open_model
from clex_local.machine import default_threads
from clex_local.model_file import context_plan
from clex_local.model_file.context_plan import cache_plan
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.model_shape import ModelShape
from clex_local.runtime.settings import Settings
from helpers.random_architectures import make_architecture
from helpers.random_gguf import make_model

pytestmark = pytest.mark.runtime


@pytest.fixture
def llm(golden_gguf):
    model = Llama(str(golden_gguf("llama")), n_ctx=0, n_batch=32, verbose=False)
    yield model
    model.close()


def test_tables_are_described_and_their_use_is_counted(llm, golden_npz):
    ids = golden_npz("llama")["ids"].tolist()
    assert isinstance(llm, llama_cpp.Llama)
    assert (llm.n_ctx(), llm.clex.original_context, llm.clex.max_context) == (256, 64, 256)
    assert (llm.clex.method, llm.clex.buckets) == ("clex", (1.0, 2.0, 3.0, 4.0))
    assert llm.clex.bucket is None
    assert [llm.clex.bucket_of(n) for n in (1, 64, 65, 128, 129, 256)] == [0, 0, 1, 1, 2, 3]
    with pytest.raises(ClexError, match="257"):
        llm.clex.bucket_of(257)
    llm.eval(ids[:64])
    assert (llm.clex.bucket, llm.clex.rerotations) == (0, 0)
    llm.eval(ids[64:65])
    assert (llm.clex.bucket, llm.clex.rerotations, llm.clex.rerotated_cells) == (1, 1, 64)
    assert llm.clex.rerotation_ms > 0


def test_progress_of_a_long_prompt_is_reported(llm, golden_npz):
    ids = golden_npz("llama")["ids"].tolist()
    seen = []
    llm.on_prefill = lambda done, total: seen.append((done, total))
    llm.eval(ids[:80])
    assert seen == [(0, 80), (32, 80), (64, 80), (80, 80)]
    seen.clear()
    llm.eval(ids[80:81])
    assert seen == []


def test_interrupted_prompt_leaves_a_usable_cache(llm, golden_npz):
    ids = golden_npz("llama")["ids"].tolist()

    def stop(done, total):
        if done == 64:
            raise KeyboardInterrupt

    llm.on_prefill = stop
    with pytest.raises(KeyboardInterrupt):
        llm.eval(ids[:100])
    assert llm.n_tokens == 64
    llm.on_prefill = None
    llm.reset()
    llm.eval(ids[:65])
    fresh = Llama(llm.model_path, n_ctx=0, n_batch=32, verbose=False)
    fresh.eval(ids[:65])
    np.testing.assert_array_equal(last_logits(llm), last_logits(fresh))
    fresh.close()


def last_logits(llm):
    pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).copy()


def test_prompt_longer_than_the_tables_is_refused_with_both_numbers(golden_gguf, golden_npz):
    ids = np.tile(golden_npz("llama")["ids"], 2)[:300].tolist()
    llm = Llama(str(golden_gguf("llama")), n_ctx=512, verbose=False)
    with pytest.raises(ClexError, match="300 tokens do not fit in a context of 256"):
        llm.eval(ids)
    with pytest.raises(ValueError, match="exceed context window of 256"):
        llm.create_completion(ids)
    # Generation ends at the tables' end as it does at the context's.
    done = llm.create_completion(ids[:250], max_tokens=None, temperature=0)
    assert done["usage"]["total_tokens"] <= 256
    llm.close()


def test_state_is_saved_and_loaded_across_a_boundary(llm, golden_npz):
    ids = golden_npz("llama")["ids"].tolist()
    llm.eval(ids[:60])
    state = llm.save_state()
    llm.eval(ids[60:70])
    expected = last_logits(llm)
    llm.load_state(state)
    llm.eval(ids[60:70])
    np.testing.assert_allclose(last_logits(llm), expected, atol=1e-6)


def test_model_without_tables_is_a_plain_llama(smollm):
    llm = Llama(str(smollm), n_ctx=256, verbose=False)
    assert llm.clex is None
    answer = llm.create_completion("The capital of France is", max_tokens=5, temperature=0)
    assert "Paris" in answer["choices"][0]["text"]
    llm.close()


def test_short_prompt_has_the_same_logits_whatever_the_context(smollm_ntk):
    """llama.cpp chooses LongRoPE factors by the allocated context; tables must follow the actual length."""
    prompt = list(range(1000, 1100))
    logits = []
    for n_ctx in (256, 0):
        llm = Llama(str(smollm_ntk), n_ctx=n_ctx, verbose=False)
        llm.eval(prompt)
        assert llm.clex.bucket == 0
        logits.append(last_logits(llm))
        llm.close()
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("content", [None, b"", b"GGUF\3\0\0", b"x" * 9999])
def test_file_that_is_no_model_is_one_error(tmp_path, content):
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClexError) as caught:
        Llama(str(path), verbose=False)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_model_is_one_error(tmp_path, golden_gguf):
    data = golden_gguf("llama").read_bytes()
    path = tmp_path / "model.gguf"
    for size in (100, 20_000, len(data) - 1000):
        path.write_bytes(data[:size])
        with pytest.raises(ClexError) as caught:
            Llama(str(path), verbose=False)
        assert str(path) in str(caught.value)


def test_quantized_values_without_flash_attention_say_what_is_wrong(golden_gguf):
    with pytest.raises(ClexError, match=r"(?i)flash"):
        Llama(str(golden_gguf("llama")), n_ctx=0, type_v=8, flash_attn=False, verbose=False)


def settings(path, **options) -> Settings:
    with closing(Llama(str(path), verbose=False, **options)) as llm:
        return llm.settings


def test_as_many_tokens_are_computed_at_once_as_the_option_says(tmp_path):
    """And the memory for them is planned."""
    path = make_model(tmp_path / "model.gguf", original=1024)
    for batch in (64, 512, 2048):
        with open_model(path, batch=batch, threads=1) as llm:
            assert (llm.settings.n_batch, llm.settings.n_ubatch) == (batch, batch)
    with GGUFFile(path) as file:
        shape = ModelShape.from_metadata(file)
    sizes = [cache_plan(shape, 4096, "f16", True, batch).compute for batch in (512, 2048, 4096, 8192)]
    assert sizes[1] > 3 * sizes[0]
    assert sizes[2] == sizes[3]  # no more than the context holds


def test_settings_are_chosen_and_can_be_given(tmp_path):
    path = make_model(tmp_path / "model.gguf")
    cores = default_threads()
    assert settings(path) == Settings(True, "f16", "f16", cores, cores, 256, 256)  # the tables cover 256 tokens
    given = {"flash_attn": False, "n_threads": 1, "n_threads_batch": 3, "n_batch": 128, "n_ubatch": 64}
    assert settings(path, **given) == Settings(False, "f16", "f16", 1, 3, 128, 64)
    assert settings(path, n_threads=3).n_threads_batch == 3
    # Flash attention computes with an F16 copy of an F32 cache, and is needed by a quantized one.
    assert not settings(path, type_k=0, type_v=0).flash_attn
    found = settings(path, type_k=1, type_v=8)
    assert (found.flash_attn, found.type_k, found.type_v) == (True, "f16", "q8_0")


@pytest.mark.parametrize(("head", "fast"), [(24, False), (48, True), (40, False), (64, True)])
def test_flash_attention_is_on_for_heads_that_it_is_fast_with(tmp_path, head, fast):
    path = make_model(tmp_path / "model.gguf", head=head)
    assert settings(path).flash_attn == fast
    assert settings(path, flash_attn=True).flash_attn


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "lfm2", "deepseek2"])
def test_flash_attention_is_on_for_windows_states_and_latent_attention(tmp_path, name):
    path = make_architecture(tmp_path / "model.gguf", name, tables=False)
    assert settings(path, n_ctx=64).flash_attn
    assert not settings(path, n_ctx=64, flash_attn=False).flash_attn


def test_q8_0_is_taken_where_only_that_fits(tmp_path, monkeypatch):
    path = make_model(tmp_path / "model.gguf", n_buckets=64, n_head_kv=2)
    with GGUFFile(path) as file:
        shape = ModelShape.from_metadata(file)
    f16, q8_0 = (cache_plan(shape, 4096, name, True).needed for name in ("f16", "q8_0"))
    for available, options, expected in [
        (f16, {}, "f16"),
        (f16 - 1, {}, "q8_0"),
        (f16 - 1, {"n_ctx": 2048}, "f16"),
        (f16 - 1, {"flash_attn": True}, "q8_0"),
        (f16 - 1, {"flash_attn": False}, "f16"),
        (f16 - 1, {"type_k": 1}, "f16"),
        (q8_0 - 1, {}, "f16"),  # as llama-cpp-python: the system may know better
    ]:
        monkeypatch.setattr(context_plan, "available_bytes", lambda available=available: available)
        found = settings(path, **{"n_ctx": 0, **options})
        assert (found.type_k, found.type_v) == (expected, expected), (available, options)


def test_settings_survive_pickling(tmp_path):
    options = {"n_threads": 3, "n_batch": 64, "type_k": 8, "type_v": 8, "verbose": False}
    with closing(Llama(str(make_model(tmp_path / "model.gguf")), **options)) as llm:
        state = pickle.loads(pickle.dumps(llm))
    with closing(state) as again:
        assert again.settings == Settings(True, "q8_0", "q8_0", 3, 3, 64, 64)


def test_settings_are_one_line(tmp_path, capfd):
    assert (
        str(Settings(True, "f16", "f16", 2, 2, 512, 512)) == "flash attention, f16 cache, 2 threads, 512 tokens at once"
    )
    assert (
        str(Settings(False, "q8_0", "f16", 1, 4, 2048, 1024))
        == "no flash attention, q8_0 key and f16 value cache, 1 thread (4 for prompts), 1,024 tokens at once"
    )
    path = str(make_model(tmp_path / "model.gguf"))
    Llama(path, n_threads=1, verbose=True).close()
    assert "clex_local: flash attention, f16 cache, 1 thread, 256 tokens at once\n" in capfd.readouterr().err
    Llama(path, n_threads=1, verbose=False).close()
    assert "clex_local" not in capfd.readouterr().err


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})


def test_another_library_imported_first_is_an_error(stock_library):
    code = "import llama_cpp\ntry:\n import clex_local\nexcept Exception as e: print(type(e).__name__, e)"
    done = run(code, LLAMA_CPP_LIB_PATH=str(stock_library))
    assert "ClexError llama_cpp was imported before clex_local" in done.stdout


def test_runtime_never_imports_torch():
    code = (
        "import sys, clex_local, clex_local.chat.cli; clex_local.Llama; "
        "print({'torch', 'clex_convert'} & set(sys.modules))"
    )
    assert run(code).stdout.strip() == "set()"
