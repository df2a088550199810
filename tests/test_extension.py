"""Tables made when a file is opened: bit for bit what the converted file computes, and no second file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from clex_convert import convert
from clex_eval.loading import coverage, open_for_evaluation
from clex_local import ClexError, Llama, open_model
from clex_local.model_file.extension import ExtensionError, extension, extension_text
from clex_local.runtime.prompt_cache import model_number
from helpers.chat_command import COMMAND
from helpers.gguf_maker import gguf_bytes, rewrite, write_split
from helpers.random_gguf import make_model, model_parts, random_tokens
from test_serve import complete, serving

pytestmark = [pytest.mark.runtime, pytest.mark.serve, pytest.mark.evaluation]

LENGTH = 64
IDS = random_tokens(240)
SCALED = {
    "yarn": {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": np.float32(2),
        "llama.rope.scaling.original_context_length": np.uint32(LENGTH // 2),
    },
    "linear": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": np.float32(2)},
}


def plain_model(path: Path, kind: str = "plain", **options) -> Path:
    """A model without tables that has this scaling of its own."""
    keys, tensors = model_parts(tables=False, original=LENGTH, **options)
    keys |= SCALED.get(kind, {})
    if kind == "llama3":
        tensors["rope_freqs.weight"] = np.linspace(1, 8, 16, dtype=np.float32)
    path.write_bytes(gguf_bytes(keys, tensors))
    return path


def logits(path, ids=IDS, **options) -> np.ndarray:
    """Of all tokens of a text that reaches the last table, read in pieces, and of one more."""
    with Llama(path, n_ctx=0, n_threads=1, n_batch=64, n_ubatch=64, verbose=False, logits_all=True, **options) as llm:
        llm.eval(ids)
        llm.eval([7])
        return llm.scores[: llm.n_tokens].copy()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return plain_model(tmp_path_factory.mktemp("extension") / "plain.gguf")


@pytest.mark.parametrize(
    ("kind", "extend", "options"),
    [
        ("plain", "4x", {}),
        ("plain", 4, {}),
        ("plain", "ntk:4x", {"method": "ntk"}),
        ("plain", "linear:8x", {"method": "linear", "max_factor": 8}),
        ("llama3", "4x", {"method": "ntk"}),
        ("linear", "4x", {"method": "ntk"}),
        ("yarn", "8x", {"method": "yarn", "max_factor": 8}),
    ],
)
def test_the_logits_are_those_of_the_converted_file(tmp_path, kind, extend, options):
    source = plain_model(tmp_path / "plain.gguf", kind)
    convert(source, tmp_path / "long.gguf", **{"max_factor": 4, **options})
    assert np.array_equal(logits(source, extend=extend), logits(tmp_path / "long.gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.gguf", "plain.gguf"]


def test_other_architectures(tmp_path, golden_gguf):
    # A mixture of experts, and a model that rotates a part of each head.
    for name in ("mixtral", "phi2"):
        clex = golden_gguf(name)
        gone = (
            "version",
            "method",
            "original_context_length",
            "scaling_factors",
            "inv_freq",
            "log_scale",
            "provenance",
        )
        source = rewrite(clex, tmp_path / f"{name}.gguf", {f"clex.{key}": None for key in gone})
        convert(source, tmp_path / f"{name}-long.gguf", max_factor=4)
        assert np.array_equal(logits(source, extend="4x"), logits(tmp_path / f"{name}-long.gguf"))


def test_split_models(plain, tmp_path):
    keys, tensors = model_parts(tables=False, original=LENGTH)
    last = {name: tensors.pop(name) for name in ("output_norm.weight", "output.weight")}
    architecture = {"general.architecture": keys["general.architecture"]}
    first, second = write_split(tmp_path / "parts", [(keys, tensors), (architecture, last)])
    assert np.array_equal(logits(first, extend="4x"), logits(plain, extend="4x"))
    before = first.read_bytes()
    with pytest.raises(ClexError, match=r"model-00002-of-00002.gguf: .*part"):
        Llama(second, extend="4x", verbose=False)
    second.unlink()
    with pytest.raises(ClexError, match=r"part 2 of the 2 of a split model is missing|model-00002-of-00002.gguf"):
        Llama(first, extend="4x", verbose=False)
    assert first.read_bytes() == before


def test_within_the_original_context_it_is_the_plain_model(plain):
    np.testing.assert_allclose(logits(plain, IDS[:60], extend="4x"), logits(plain, IDS[:60]), atol=1e-3)


def test_what_the_model_says_of_itself(plain):
    with Llama(plain, n_ctx=0, extend="4x", verbose=False, kv_overrides={"general.name": "other"}) as llm:
        assert llm.clex is not None
        assert (llm.clex.method, llm.clex.buckets, llm.n_ctx()) == ("yarn", (1.0, 2.0, 3.0, 4.0), 4 * LENGTH)
        assert llm.metadata["clex.method"] == "yarn"
        assert llm.kv_overrides == {"general.name": "other"}
        number = model_number(llm, llm._options)
        copy = pickle.loads(pickle.dumps(llm))
        with copy:
            assert copy.n_ctx() == 4 * LENGTH
            assert model_number(copy, copy._options) == number
    for other in ({"extend": "8x"}, {}):
        with Llama(plain, n_ctx=LENGTH, verbose=False, kv_overrides={"general.name": "other"}, **other) as llm:
            assert model_number(llm, llm._options) != number


def test_the_store_tells_them_apart(tmp_path):
    source = plain_model(tmp_path / "plain.gguf", "plain")
    long = tmp_path / "long.gguf"
    convert(source, long, max_factor=16)
    ids = random_tokens(900)

    def restored(path, **options) -> int:
        settings = {"n_ctx": 1024, "n_batch": 256, "n_ubatch": 256, "n_threads": 1, "verbose": False}
        with Llama(path, store=tmp_path / "store", **settings, **options) as llm:
            next(llm.generate(ids, temp=0.0))
            return llm.restored_tokens

    assert restored(source, extend="16x") == 0
    assert restored(source, extend="16x") == 768
    assert restored(source, extend="ntk:16x") == 0
    assert restored(long) == 0
    with pytest.warns(match="without tables"):
        assert restored(source) == 0
    assert restored(source, extend="16x") == 768


def test_a_state_is_for_the_same_tables(plain):
    options = {"n_ctx": 128, "n_threads": 1, "verbose": False}
    with Llama(plain, extend="4x", **options) as llm:
        llm.eval(IDS[:100])
        state = llm.save_state()
    with Llama(plain, extend="4x", **options) as llm:
        llm.load_state(state)
        assert llm.n_tokens == 100
    with Llama(plain, extend="8x", **options) as llm, pytest.raises(ClexError, match="other RoPE tables"):
        llm.load_state(state)


@pytest.mark.parametrize("wish", ["65537x", "ntk:99999x", "9" * 18, 99999])
def test_wishes_that_are_too_large(plain, wish):
    with pytest.raises(ExtensionError, match=r"^`extend` must be 65536x at most, and beyond 16x .* measured .*, not '"):
        extension(plain, wish)


@pytest.mark.parametrize("wish", ["9" * 19, "", "x", "0x", "4.5x", "4y", "-4", "ntk:", "4x;", 0.5])
def test_wishes_that_are_none(plain, wish):
    with pytest.raises(ExtensionError, match="such as 4x, or ntk:4x"):
        extension(plain, wish)


def test_wishes_are_kept_in_one_form():
    assert [extension_text(text) for text in ("4", "4X", " 04x ", "NTK:4")] == ["4x", "4x", "4x", "ntk:4x"]


def test_files_that_are_not_extended(plain, tmp_path):
    long = make_model(tmp_path / "long.gguf")
    with pytest.raises(ClexError, match=r"long.gguf: has tables already, up to 256 tokens; leave `extend` out"):
        Llama(long, extend="4x", verbose=False)
    with pytest.raises(ClexError, match="the method must be one of"):
        Llama(plain, extend="magic:4x", verbose=False)
    convert(plain, tmp_path / "baked.gguf", bake=128)
    with pytest.raises(ClexError, match="has the frequencies of one table already"):
        Llama(tmp_path / "baked.gguf", extend="4x", verbose=False)
    with pytest.raises(ClexError, match="no such model file"):
        Llama(tmp_path / "none.gguf", extend="4x")


def test_a_longer_context_is_offered_where_it_is_missing(plain):
    with pytest.raises(
        ClexError, match=r"`extend='3x'` makes them now, `clex-convert MODEL OUT.gguf` adds them for good"
    ):
        open_model(plain, ctx=3 * LENGTH)
    # No more than is known to be of use, and what does the same for good.
    more = "`clex-convert MODEL OUT.gguf --max-factor 16` adds them for good"
    for ctx, advice in [
        (16, f"`extend='16x'` makes them now, {more}$"),
        (17, f"`extend='16x'` makes some for {16 * LENGTH:,} tokens now, {more}; beyond that it was never"),
    ]:
        with pytest.raises(ClexError, match=advice):
            open_model(plain, ctx=ctx * LENGTH)
        with pytest.warns(UserWarning, match=advice), Llama(plain, n_ctx=ctx * LENGTH, n_threads=1, verbose=False):
            pass
    with open_model(plain, ctx=3 * LENGTH, extend="3x", threads=1) as llm:
        assert llm.n_ctx() == 3 * LENGTH


def test_the_command_extends_and_the_session_keeps_it(plain, tmp_path):
    def run(*arguments):
        options = ("--threads", "1", "--max-tokens", "1", "--json", "-p", "Hi", "--no-store", "--session", "extended")
        result = subprocess.run([*COMMAND, *map(str, arguments), *options], input="", capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    first = run(plain, "--chat-template", "plain", "--extend", "2")
    assert (first["clex"]["buckets"], first["context"]) == ([1.0, 2.0], 2 * LENGTH)
    assert run()["clex"] == first["clex"]
    assert run(plain)["clex"] == first["clex"]  # the same model, named once more
    other = shutil.copy(plain, tmp_path / "other.gguf")  # which may have tables of its own
    assert run(other)["clex"] is None


def test_an_option_that_is_none_is_one_line(plain):
    for options, code, line in [
        (["--extend", "far"], 2, "must be how many times the context is to be as long, such as 4x"),
        (["--extend", "99999x"], 2, "Invalid value for '--extend': must be 65536x at most, and beyond 16x"),
        (["--ctx", "99999999"], 1, f"asked for; --extend 16x makes some for {16 * LENGTH:,} tokens now, `clex-convert"),
    ]:
        command = [*COMMAND, str(plain), *options, "-p", "Hi"]
        result = subprocess.run(command, input="", capture_output=True, text=True)
        assert (result.returncode, result.stderr.count("\n")) == (code, 1)
        assert line in result.stderr


@pytest.mark.parametrize("several", [False, True])
def test_the_server_extends(plain, tmp_path, several):
    models = [plain]
    if several:
        models.append(plain_model(tmp_path / "second model, of two.gguf", seed=5))
    convert(models[-1], tmp_path / "long.gguf", max_factor=4)
    answers = []
    for paths, extend in ((models, "4x"), ([tmp_path / "long.gguf"], None)):
        with serving(paths, extend=extend, parallel=1, store=False) as client:
            more = {"model": models[-1].stem} if len(paths) > 1 else {}
            answers.append(complete(client, IDS[:200], 4, n_probs=5, **more))
    assert answers[0]["tokens"] == answers[1]["tokens"]
    assert answers[0]["completion_probabilities"] == answers[1]["completion_probabilities"]
    assert answers[0]["timings"]["clex"]["bucket"] == 3


def test_a_draft_model_beside_it_keeps_its_own_keys(plain, tmp_path):
    """llama-server loads it with the same overrides; tables for other heads would not even fit."""
    draft = plain_model(tmp_path / "draft.gguf", head=16, n_head=4, n_layer=1)
    drafting = ["--model-draft", str(draft), "--spec-type", "draft-simple"]
    drafting += ["--spec-draft-n-max", "4", "--spec-draft-p-min", "0"]
    answers = []
    for more in ([], drafting):
        with serving(plain, *more, extend="4x", parallel=1, batch=64, store=False) as client:
            answers.append(complete(client, IDS[:100]))
    assert answers[0]["tokens"] == answers[1]["tokens"]
    assert answers[1]["timings"]["clex"]["bucket"] == 1
    assert answers[1]["timings"]["draft_n"] > 0


def test_a_name_that_is_no_utf8_is_extended_too(plain, tmp_path):
    path = tmp_path / os.fsdecode(b"odd \xff.gguf")
    try:
        shutil.copy(plain, path)
    except OSError:
        pytest.skip("no such names here")
    with extension(path, "4x").overrides() as keys:
        assert Path(*keys.values()).stat().st_size > 0


def test_evaluation_extends(plain, tmp_path):
    convert(plain, tmp_path / "long.gguf", max_factor=4)
    assert coverage(plain, "4x") == coverage(tmp_path / "long.gguf")
    ids = np.array(IDS, np.int32)
    values = []
    for path, extend in ((plain, "4x"), (tmp_path / "long.gguf", None)):
        with open_for_evaluation(path, ctx=0, threads=1, extend=extend) as model:
            values.append(model.negative_log_likelihoods(ids))
    assert np.array_equal(*values)
    with pytest.raises(ClexError, match="`extend` is for GGUF files"):
        coverage(tmp_path, "4x")
