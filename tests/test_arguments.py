"""Arguments of ``Llama`` that cannot be followed are refused by name, and nothing is dropped without a word."""

from __future__ import annotations

import pickle
import sys
import warnings

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_cache import LlamaDiskCache, LlamaRAMCache

from clex_local import Llama
from clex_local.errors import ModelError
from clex_local.model_file.tables import ContextError
from clex_local.runtime.arguments import ArgumentError, ContextWarning
from helpers.gguf_maker import gguf_bytes
from helpers.random_gguf import make_model

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("arguments")
    make_model(target / "tables.gguf")
    make_model(target / "plain.gguf", tables=False, original=256)
    make_model(target / "other.gguf", tables=False, original=256, seed=1)
    make_model(target / "other-tables.gguf", seed=1)
    return target


def load(path, **options) -> Llama:
    return Llama(path, **{"n_ctx": 256, "n_threads": 1, "verbose": False, **options})


@pytest.mark.parametrize(
    ("name", "meant"),
    [("n_gpu", "n_gpu_layers"), ("n_context", "n_ctx"), ("ctx", "n_ctx"), ("prefix_re_use", "prefix_reuse")],
)
def test_unknown_keyword_is_refused_with_those_it_may_stand_for(folder, name, meant):
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'; did you mean .*\b{meant}\b"):
        load(folder / "tables.gguf", **{name: 1})


def test_unknown_keyword_that_is_like_no_other(folder):
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'xyzzy'$"):
        load(folder / "tables.gguf", xyzzy=1)


def test_keywords_of_other_packages(folder):
    """What LangChain passes whether it was given or not: two are gone, and the rotation is the one of old models."""
    options = {"n_parts": -1, "f16_kv": True, "rope_freq_base": 10000.0, "rope_freq_scale": 1.0, "lora_path": None}
    with load(folder / "tables.gguf", lora_base=None, seed=-1, use_mlock=False, **options) as llm:
        llm.eval([5])


ROPE = {
    "rope_freq_base": 500000.0,
    "rope_freq_scale": 0.5,
    "rope_scaling_type": llama_cpp.LLAMA_ROPE_SCALING_TYPE_YARN,
    "yarn_ext_factor": 1.0,
    "yarn_attn_factor": 2.0,
    "yarn_beta_fast": 16.0,
    "yarn_beta_slow": 2.0,
    "yarn_orig_ctx": 64,
    "kv_overrides": {"llama.rope.freq_base": 20000.0},
}


@pytest.mark.parametrize("name", ROPE)
def test_rotation_that_tables_would_overrule_is_refused(folder, name):
    with pytest.raises(ArgumentError) as caught:
        load(folder / "tables.gguf", **{name: ROPE[name]})
    named = "llama.rope.freq_base" if name == "kv_overrides" else name
    assert str(caught.value).startswith(f"{folder / 'tables.gguf'}: {named} would have no effect, since")
    assert isinstance(caught.value, ValueError)
    load(folder / "plain.gguf", **{name: ROPE[name]}).close()


def test_all_of_them_are_named(folder):
    with pytest.raises(ArgumentError, match=r"rope_freq_base, yarn_orig_ctx, clex\.method would have"):
        load(folder / "tables.gguf", rope_freq_base=2.0, yarn_orig_ctx=5, kv_overrides={"clex.method": "x"})


def test_arguments_survive_pickling(folder):
    for name in ("tables", "plain"):
        with load(folder / f"{name}.gguf") as llm, pickle.loads(pickle.dumps(llm)) as again:
            assert again.n_ctx() == 256


NUMBERS = {
    "n_ctx": (-1, -5, 2**32 + 512),
    "n_batch": (0, -1),
    "n_ubatch": (0, -1),
    "n_threads": (-1,),
    "n_threads_batch": (-1,),
    "type_k": (-1, 4, 5, 16, 26, 99),
    "type_v": (-1, 5, 26),
    "pooling_type": (-5, 9),
    "attention_type": (7,),
    "rope_scaling_type": (9,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values])
def test_number_that_llama_cpp_would_compute_with_is_refused(folder, name, value):
    """Some of them end the process there, with a division by zero or a read beside a table."""
    with pytest.raises(ArgumentError, match=rf"^{name} .*{value:,}|^{name} {value} "):
        load(folder / "plain.gguf", **{name: value})


@pytest.mark.parametrize("code", [0, 1, 2, 3, 6, 7, 8, 20, 30])
def test_every_type_of_cache_computes(folder, code):
    with load(folder / "tables.gguf", type_k=code, type_v=code, flash_attn=True) as llm:
        assert np.isfinite(logits(llm)).all()


def test_vocabulary_alone_does_not_compute(folder):
    for name in ("plain", "tables"):
        with load(folder / f"{name}.gguf", vocab_only=True, embedding=True) as llm:
            assert llm.detokenize(llm.tokenize(b"ab", add_bos=False)).strip() == b"ab"
            assert llm.settings.n_threads == 1
            for call in (
                *(lambda: llm.eval([5]), lambda: next(llm.generate([5])), lambda: llm("a", max_tokens=1)),
                *(lambda: llm.embed("a"), lambda: llm.save_state(), lambda: llm.reset()),
            ):
                with pytest.raises(ModelError, match="vocab_only=True"):
                    call()


def test_tokens_that_see_each_other_are_computed_together(folder):
    """llama.cpp ends the process where they are more than a ubatch."""
    options = {"attention_type": llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL, "n_ubatch": 32}
    with load(folder / "plain.gguf", **options) as llm:
        llm.eval(list(range(3, 35)))
        with pytest.raises(ContextError, match=r"33 tokens do not fit in a ubatch, .* of 32"):
            llm.eval(list(range(3, 36)))


def test_context_beyond_the_training_is_a_warning(folder):
    path = folder / "plain.gguf"
    with pytest.warns(ContextWarning, match=r"plain.gguf: trained for 256 tokens, .* 512; .*clex-convert") as caught:
        load(path, n_ctx=512).close()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(path, n_ctx=256).close()
        load(path, n_ctx=0).close()
        load(path, n_ctx=512, vocab_only=True).close()
        load(path, n_ctx=512, rope_freq_scale=0.5).close()  # asked for
        load(folder / "tables.gguf", n_ctx=256).close()


def test_context_beyond_the_tables_is_lowered_and_a_warning(folder):
    path = folder / "tables.gguf"
    with pytest.warns(ContextWarning, match=r"tables.gguf: .* holds 256 tokens, .* not the 512 asked for;") as caught:
        llm = load(path, n_ctx=512)
    assert (caught[0].filename, len(caught), llm.n_ctx()) == (__file__, 1, 256)
    llm.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(path, n_ctx=0).close()
        load(path, n_ctx=512, clamp=True).close()  # asked for
        load(path, n_ctx=512, vocab_only=True).close()


def adapter(path, changes=None, rows=64, kind=np.float32):
    """An adapter of the query matrix of the first layer."""
    rng = np.random.default_rng(0)
    keys = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": np.float32(8),
    } | (changes or {})
    keys = {key: value for key, value in keys.items() if value is not None}
    tensors = {
        "blk.0.attn_q.weight.lora_a": rng.standard_normal((4, 64)).astype(kind),
        "blk.0.attn_q.weight.lora_b": rng.standard_normal((rows, 4)).astype(kind),
    }
    path.write_bytes(gguf_bytes(keys, tensors))
    return path


def logits(llm):
    llm.eval(list(range(3, 80)))
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()


def test_adapter_changes_what_is_computed(folder, tmp_path, monkeypatch):
    path = adapter(tmp_path / "lora.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    with load(folder / "tables.gguf") as llm:
        plain = logits(llm)
    for given in (path, str(path), "~/lora.gguf"):
        with load(folder / "tables.gguf", lora_path=given) as llm:
            found = logits(llm)
            assert np.abs(found - plain).max() > 0.1
            with pickle.loads(pickle.dumps(llm)) as again:
                np.testing.assert_array_equal(logits(again), found)


ADAPTERS = {
    "missing": (lambda path: None, "cannot be read"),
    "folder": (lambda path: path.mkdir(), "cannot be read"),
    "text": (lambda path: path.write_text("hello"), "not a GGUF file"),
    "a model": (lambda path: make_model(path), "not a LoRA adapter"),
    "cut": (lambda path: path.write_bytes(adapter(path).read_bytes()[:-600]), "truncated"),
    "cut header": (lambda path: path.write_bytes(adapter(path).read_bytes()[:99]), "damaged"),
    "other kind": (lambda path: adapter(path, {"adapter.type": "control"}), "not a LoRA adapter"),
    "type no text": (lambda path: adapter(path, {"adapter.type": np.uint32(1)}), "not a LoRA adapter"),
    "alpha no number": (lambda path: adapter(path, {"adapter.lora.alpha": "8"}), "damaged LoRA adapter"),
    "architecture missing": (lambda path: adapter(path, {"general.architecture": None}), "not a LoRA adapter"),
    "other architecture": (lambda path: adapter(path, {"general.architecture": "qwen2"}), "arch mismatch"),
    "other model": (lambda path: adapter(path, rows=32), "incorrect shape"),
    "invocation": (lambda path: adapter(path, {"adapter.alora.invocation_tokens": "x"}), "invalid gguf type"),
}


@pytest.mark.parametrize(("make", "message"), ADAPTERS.values(), ids=ADAPTERS)
def test_adapter_that_cannot_be_applied_is_one_error(folder, tmp_path, make, message):
    path = tmp_path / "lora.gguf"
    make(path)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder / "tables.gguf", lora_path=path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def complete(llm, prompt="a long beginning of a prompt") -> str:
    return llm.create_completion(prompt, max_tokens=8, temperature=0)["choices"][0]["text"]


@pytest.fixture(params=["ram", "disk"])
def cache(request, tmp_path):
    return LlamaRAMCache() if request.param == "ram" else LlamaDiskCache(str(tmp_path / "cache"))


@pytest.mark.parametrize("pair", [("plain", "other"), ("tables", "other-tables"), ("tables", "other")])
def test_prompt_cache_of_another_model_is_a_miss(folder, cache, pair):
    """Also where the two have the same shape, so that the state would fit."""
    expected = []
    for name in pair:
        with load(folder / f"{name}.gguf") as llm:
            expected.append(complete(llm))
    assert expected[0] != expected[1]
    first, second = (load(folder / f"{name}.gguf") for name in pair)
    with first, second:
        first.set_cache(cache)
        second.set_cache(cache)
        for _ in range(2):
            assert [complete(first), complete(second)] == expected
            first.reset()
            second.reset()


def hits(llm) -> list[int]:
    """Lengths of the states that are loaded from now on."""
    found, load_state = [], llm.load_state

    def count(state):
        load_state(state)
        found.append(state.n_tokens)

    llm.load_state = count
    return found


def test_prompt_cache_of_this_model_is_a_hit(folder, cache):
    prompt = "a long beginning of a prompt"
    with load(folder / "tables.gguf") as llm:
        llm.set_cache(cache)
        assert llm.cache is not None
        expected = complete(llm)
    with load(folder / "tables.gguf") as again:
        again.set_cache(cache)
        assert again.tokenize(prompt.encode()) in again.cache
        assert again.tokenize(b"zzz", add_bos=False) not in again.cache
        found = hits(again)
        assert complete(again) == expected
        assert len(found) == 1
        again.set_cache(None)
        assert again.cache is None


@pytest.mark.parametrize("change", ["type", "context", "adapter", "rotation", "policy"])
def test_prompt_cache_of_another_context_of_this_model_is_a_miss(folder, cache, tmp_path, change):
    """What a state cannot be loaded into, and what makes its keys wrong."""
    options = {
        "type": {"type_k": 0, "type_v": 0},
        "context": {"n_ctx": 64},
        "adapter": {"lora_path": adapter(tmp_path / "lora.gguf")},
        "rotation": {"rope_freq_scale": 0.25},
        "policy": {"policy": "fixed"},
    }[change]
    model = folder / ("plain.gguf" if change == "rotation" else "tables.gguf")
    prompt = "abc " * 5
    with load(model, **options) as llm:
        expected = complete(llm, prompt)
    with load(model) as llm:
        llm.set_cache(cache)
        complete(llm, prompt + "def " * 25)
    with load(model, **options) as llm:
        llm.set_cache(cache)
        found = hits(llm)
        assert complete(llm, prompt) == expected
        assert found == [] or change == "context"


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux alone")
def test_weights_are_read_into_memory_that_holds_them_twice(folder, monkeypatch, capfd):
    def mapped(**arguments: bool | None) -> bool:
        with load(folder / "plain.gguf", verbose=True, **arguments):
            return "CPU_Mapped model buffer" in capfd.readouterr().err

    assert not mapped()
    assert mapped(use_mmap=True)
    size = (folder / "plain.gguf").stat().st_size
    monkeypatch.setattr("clex_local.machine.available_bytes", lambda: 2 * size)
    assert not mapped()
    monkeypatch.setattr("clex_local.machine.available_bytes", lambda: 2 * size - 1)
    assert mapped()
    assert not mapped(use_mmap=False)
