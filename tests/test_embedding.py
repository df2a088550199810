"""Embeddings of texts: each must be that of the text alone on a fresh context, computed here token by token."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from clex_local import ClexError, Llama
from clex_local.errors import ModelError
from clex_local.model_file.tables import ContextError
from clex_local.runtime.arguments import ContextWarning
from clex_local.runtime.embedding import EmbeddingError
from helpers.gguf_maker import gguf_bytes
from helpers.random_gguf import make_model, model_parts

pytestmark = pytest.mark.runtime

NONE, MEAN, CLS, LAST, RANK = range(5)
POOLED = {
    NONE: lambda rows: rows,
    MEAN: lambda rows: rows.mean(0),
    CLS: lambda rows: rows[0],
    LAST: lambda rows: rows[-1],
}
# of 1 to 200 tokens, so that they are in four buckets where there are tables, and no two are alike
TEXTS = ["ab" * 50, "c", "hello", "d" * 63, "xyz" * 33, "a text " * 10, "efg" * 66]


def load(path: Path, pooling: int = NONE, **options) -> Llama:
    options = {"n_ctx": 256, "n_batch": 256, "n_ubatch": 256, "type_k": 0, "type_v": 0, "flash_attn": False, **options}
    return Llama(path, embedding=True, pooling_type=pooling, n_threads=1, verbose=False, **options)


@pytest.fixture(scope="module", params=["tables", "log_scale", "plain"])
def model(request, tmp_path_factory) -> Path:
    """Bucketed at 64, 128, 192 and 256 tokens; or a plain model of 256."""
    options = {
        "tables": {},
        "log_scale": {"log_scale": True},
        "plain": {"tables": False, "original": 256},
    }
    return make_model(tmp_path_factory.mktemp("embedding") / "model.gguf", **options[request.param])


def alone(path: Path, text: str) -> np.ndarray:
    """Embeddings of the tokens of one text [tokens, n_embd], by ``eval`` in one ubatch of a new context."""
    with load(path) as llm:
        tokens = llm.tokenize(text.encode())
        llm.eval(tokens)
        pointer = llama_cpp.llama_get_embeddings(llm.ctx)
        return np.ctypeslib.as_array(pointer, shape=(len(tokens), llm.n_embd())).copy()


@pytest.fixture(scope="module")
def expected(model) -> list[np.ndarray]:
    return [alone(model, text) for text in TEXTS]


@pytest.mark.parametrize("pooling", [NONE, MEAN, CLS, LAST])
@pytest.mark.parametrize("sizes", [(256, 256), (256, 32), (32, 32), (100, 64), (512, 7)])
def test_each_text_is_embedded_as_if_alone(model, expected, pooling, sizes):
    """In any order, beside others or not, and in batches and ubatches shorter than the text."""
    n_batch, n_ubatch = sizes
    with load(model, pooling, n_batch=n_batch, n_ubatch=n_ubatch) as llm:
        together = llm.embed(TEXTS)
        reverse = llm.embed(TEXTS[::-1])[::-1]
        single = [llm.embed(text) for text in TEXTS]
        items = llm.create_embedding(TEXTS)
    assert [item["embedding"] for item in items["data"]] == together
    assert items["usage"]["prompt_tokens"] == sum(map(len, expected))
    for found in (together, reverse, single):
        for row, reference in zip(found, expected, strict=True):
            np.testing.assert_allclose(row, POOLED[pooling](reference), atol=2e-4, rtol=0)


def test_default_pooling_gives_the_tokens_of_each_text(model, expected):
    with Llama(model, embedding=True, n_ctx=256, verbose=False, type_k=0, type_v=0, flash_attn=False) as llm:
        for row, reference in zip(llm.embed(TEXTS), expected, strict=True):
            np.testing.assert_allclose(row, reference, atol=2e-4, rtol=0)


def test_embeddings_are_normalized_on_request(model):
    for pooling in (NONE, MEAN):
        with load(model, pooling) as llm:
            for plain, normal in zip(llm.embed(TEXTS), llm.embed(TEXTS, normalize=True), strict=True):
                length = np.linalg.norm(plain, axis=-1, keepdims=True)
                np.testing.assert_allclose(normal, np.array(plain) / length, atol=1e-6)


def test_more_texts_than_sequences(model, expected):
    texts = TEXTS * 40
    with load(model, LAST) as llm:
        for row, reference in zip(llm.embed(texts), expected * 40, strict=True):
            np.testing.assert_allclose(row, reference[-1], atol=2e-4, rtol=0)
        assert llm.embed([]) == []
        assert llm.create_embedding([])["data"] == []


def test_text_longer_than_the_context_is_refused_and_cut_on_request(model, expected):
    with load(model, MEAN, n_batch=64) as llm:
        long = "a" * 400
        tokens = llm.tokenize(long.encode())
        with pytest.raises(ContextError, match=r"text 2 of 3 has \d+ tokens, the context .*256"):
            llm.embed(["short", long, "short"])
        row, count = llm.embed(long, truncate=True, return_count=True)
        assert count == 256 < len(tokens)
    with load(model) as llm:
        llm.eval(tokens[:256])
        pointer = llama_cpp.llama_get_embeddings(llm.ctx)
        rows = np.ctypeslib.as_array(pointer, shape=(256, llm.n_embd())).copy()
    np.testing.assert_allclose(row, rows.mean(0), atol=2e-4, rtol=0)


def test_a_conversation_before_and_after(model, expected):
    """What the cache held changes no embedding, and no embedding changes what is generated."""
    with load(model, MEAN) as llm:
        prompt = list(range(3, 200))

        def answer():
            return [token for token, _ in zip(llm.generate(prompt, temp=0), range(20), strict=False)]

        first = answer()
        np.testing.assert_allclose(llm.embed(TEXTS[0]), expected[0].mean(0), atol=2e-4, rtol=0)
        assert llm.n_tokens == 0
        assert answer() == first
        llm.eval([5] * 20)
        np.testing.assert_allclose(llm.embed(TEXTS)[2], expected[2].mean(0), atol=2e-4, rtol=0)


def test_refused_texts_leave_a_usable_model(tmp_path):
    keys, tensors = model_parts()
    keys["tokenizer.ggml.add_bos_token"] = np.bool_(False)
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(keys, tensors))
    with load(path, MEAN) as llm:
        before = llm.embed("abc")
        with pytest.raises(EmbeddingError, match=r"text 2 of 2 has no tokens"):
            llm.embed(["abc", ""])
        with pytest.raises(EmbeddingError, match="not valid Unicode"):
            llm.embed(["abc", "\udcff"])
        assert llm.embed("abc") == before
    with Llama(path, verbose=False) as llm, pytest.raises(RuntimeError, match="embedding=True"):
        llm.embed("abc")


def qwen3(path: Path, classes: int) -> tuple[Path, np.ndarray]:
    """A model that ranks, and the weights of its classifier."""
    keys, tensors = model_parts(head=32, tables=True)
    keys = {key.replace("llama.", "qwen3."): value for key, value in keys.items()}
    keys |= {"general.architecture": "qwen3", "qwen3.attention.key_length": np.uint32(32)}
    keys |= {"qwen3.attention.value_length": np.uint32(32), "qwen3.pooling_type": np.uint32(RANK)}
    keys["qwen3.classifier.output_labels"] = [f"label {i}" for i in range(classes)]
    for i in range(2):
        tensors |= {f"blk.{i}.attn_{name}_norm.weight": np.ones(32, np.float32) for name in "qk"}
    weights = np.random.default_rng(5).standard_normal((classes, 64)).astype(np.float32) / 4
    tensors["cls.output.weight"] = weights
    path.write_bytes(gguf_bytes(keys, tensors))
    return path, weights


@pytest.mark.parametrize("n_ubatch", [256, 32])
def test_scores_of_a_model_that_ranks(tmp_path, n_ubatch):
    path, weights = qwen3(tmp_path / "model.gguf", classes=3)
    with Llama(path, embedding=True, n_ctx=256, n_ubatch=n_ubatch, verbose=False, type_k=0, type_v=0) as llm:
        assert llm.pooling_type() == RANK
        found = llm.embed(TEXTS)
        assert llm.embed(TEXTS, normalize=True) == found
    for scores, text in zip(found, TEXTS, strict=True):
        logits = weights @ alone(path, text)[-1]
        np.testing.assert_allclose(scores, np.exp(logits) / np.exp(logits).sum(), atol=1e-4)


def test_model_without_a_classifier_does_not_rank(model):
    with pytest.raises(ClexError, match="cannot rank"):
        load(model, RANK)


def bert(path: Path) -> Path:
    """An encoder of 128 positions: its tokens see each other, and it has no cache."""
    rng = np.random.default_rng(0)
    width, ffn, letters = 32, 64, [chr(ord("a") + i) for i in range(26)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"\u2581{c}" for c in letters), *letters]

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    tensors = {
        "token_embd.weight": draw(len(words), width) * 6,
        "token_types.weight": draw(2, width),
        "position_embd.weight": draw(128, width) * 6,
        "token_embd_norm.weight": np.ones(width, np.float32),
        "token_embd_norm.bias": draw(width),
    }
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"):
        rows, columns = {"ffn_up": (ffn, width), "ffn_down": (width, ffn)}.get(name, (width, width))
        tensors |= {f"blk.0.{name}.weight": draw(rows, columns) * 2, f"blk.0.{name}.bias": draw(rows)}
    for name in ("attn_output_norm", "layer_output_norm"):
        tensors |= {f"blk.0.{name}.weight": np.ones(width, np.float32), f"blk.0.{name}.bias": draw(width)}
    keys = {
        "general.architecture": "bert",
        "bert.block_count": np.uint32(1),
        "bert.context_length": np.uint32(128),
        "bert.embedding_length": np.uint32(width),
        "bert.feed_forward_length": np.uint32(ffn),
        "bert.attention.head_count": np.uint32(2),
        "bert.attention.layer_norm_epsilon": np.float32(1e-6),
        "bert.attention.causal": np.bool_(False),
        "bert.pooling_type": np.uint32(MEAN),
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.token_type_count": np.uint32(2),
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": np.array([3] * 5 + [1] * 52, np.int32),
    } | {
        f"tokenizer.ggml.{name}_token_id": np.uint32(i)
        for i, name in enumerate(("padding", "unknown", "cls", "seperator", "mask"))
    }
    keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"] = np.uint32(2), np.uint32(3)
    path.write_bytes(gguf_bytes(keys, tensors))
    return path


@pytest.mark.parametrize("pooling", [NONE, MEAN, CLS, LAST])
def test_texts_of_an_encoder(tmp_path, pooling):
    """It has no cache and computes a text at once, so that a text is at most a ubatch or its training long."""
    path = bert(tmp_path / "bert.gguf")
    texts = ["a", "bcd efg", "h" * 60, "i j k l m", "n" * 100]
    with load(path, NONE, n_ctx=128) as llm:
        rows = [np.array(llm.embed(text)) for text in texts]
    assert [len(row) for row in rows] == [3, 8, 62, 7, 102]
    with load(path, pooling, n_ctx=128, n_batch=128, n_ubatch=110) as llm:
        for row, reference in zip(llm.embed(texts), rows, strict=True):
            np.testing.assert_allclose(row, POOLED[pooling](reference), atol=1e-3, rtol=0)
        with pytest.raises(ContextError, match=r"122 tokens, a batch .* holds 110"):
            llm.embed("o" * 120)
        assert llm.embed("o" * 120, truncate=True, return_count=True)[1] == 110
    with pytest.warns(ContextWarning, match=r"trained for 128 tokens, .* 512; pass n_ctx=128$"):
        llm = load(path, pooling, n_ctx=512)
    with llm, pytest.raises(ContextError, match="the model was trained for 128"):
        llm.embed("o" * 150)
    with load(path, pooling, n_ctx=128) as llm:
        for call in (lambda: llm.eval([5]), lambda: next(llm.generate([5]))):
            with pytest.raises(ModelError, match="an encoder"):
                call()
