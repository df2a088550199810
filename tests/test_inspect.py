"""What clex-inspect says of a model file, and the picture it draws."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from click.testing import CliRunner

from clex_convert import convert
from clex_local import ClexError, Llama, inspect
from clex_local.inspection.cli import main
from clex_local.inspection.plot import plot
from clex_local.library import llama_clex
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.memory import compute_bytes, kv_bytes
from clex_local.model_file.model_shape import ModelShape
from clex_local.model_file.tables import read_tables
from helpers.gguf_maker import MODEL, gguf_bytes, rewrite
from helpers.low_level import Model
from helpers.random_gguf import make_model, model_parts

pytestmark = pytest.mark.inspect

PAGE = Path(__file__).parent.parent / "docs" / "inspect.md"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def refused(*arguments: object, code: int = 1) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert (result.exit_code, result.stdout) == (code, "")
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("clex-inspect: error: ")
    return result.stderr


def with_keys(path: Path, **keys: Any) -> Path:
    path.write_bytes(gguf_bytes({**MODEL, **{name.replace("__", "."): value for name, value in keys.items()}}))
    return path


# what is in the file


def test_a_real_model_with_tables(smollm_ntk):
    found = inspect(smollm_ntk)
    assert (found.architecture, found.name) == ("llama", "Smollm2 135M 8k Lc100K Mix1 Ep2")
    assert (found.file_type, found.parameters, found.file_bytes) == ("q4_1", 134_515_008, smollm_ntk.stat().st_size)
    assert [(kind.name, kind.tensors) for kind in found.tensor_types] == [("q4_1", 210), ("q8_0", 1), ("f32", 61)]
    with GGUFFile(smollm_ntk) as file:
        assert found.tensor_bytes == sum(tensor.size for tensor in file.tensors) < found.file_bytes
    assert (found.trained_context, found.original_context, found.max_context) == (8192, 8192, 32768)
    assert (found.rope.base, found.rope.dimension, found.rope.scaling) == (100_000, 64, {})
    assert found.tables_in_file
    assert [(b.first, b.last, b.factor, b.attn_scale) for b in found.buckets] == [
        (1, 8192, 1, 1),
        (8193, 16384, 2, 1),
        (16385, 24576, 3, 1),
        (24577, 32768, 4, 1),
    ]
    assert found.provenance["growth"] == 2
    assert [entry.context for entry in found.memory] == [8192, 16384, 32768]


def test_the_buckets_are_those_that_the_library_chooses(tmp_path):
    keys, tensors = model_parts(original=100, n_buckets=4)
    keys["clex.scaling_factors"] = np.array([1, 1.333, 2.5, 7], np.float32)
    keys["clex.attn_scale"] = np.array([1, 1.25, 1.5, 2], np.float32)
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(keys, tensors))
    model, found = Model(path), inspect(path)
    for index, bucket in enumerate(found.buckets):
        assert llama_clex.bucket(model.pointer, bucket.first) == llama_clex.bucket(model.pointer, bucket.last) == index
        assert llama_clex.attn_scale(model.pointer, index) == bucket.attn_scale
    assert llama_clex.bucket(model.pointer, found.max_context + 1) == -1
    model.close()


def test_the_memory_is_what_a_chat_reckons_with(smollm):
    found = inspect(smollm, ctx=[1000, 4096], kv_types=["q5_1", "bf16"])
    with GGUFFile(smollm) as file:
        shape = ModelShape.from_metadata(file)
    assert [entry.context for entry in found.memory] == [1000, 4096]
    for entry in found.memory:
        assert entry.kv == {name: kv_bytes(shape, entry.context, name) for name in ("q5_1", "bf16")}
        assert entry.compute == compute_bytes(shape, entry.context)
        assert entry.compute_flash_attn == compute_bytes(shape, entry.context, flash_attn=True)


def test_a_type_of_cache_that_the_heads_do_not_fit(tmp_path):
    path = make_model(tmp_path / "m.gguf", head=16)
    assert inspect(path, ctx=[64]).memory[0].kv["q8_0"] is None
    row = next(line for line in run(path, "--ctx", 64).splitlines() if line.strip().startswith("64 "))
    assert row.split().count("-") == 4


def test_a_file_without_tables_says_so(smollm):
    found = inspect(smollm)
    assert (found.tables, found.buckets, found.max_context) == (None, (), 8192)
    text = run(smollm)
    assert "none: runs as in llama.cpp" in text
    assert "base 100,000, dimension 64" in text


@pytest.mark.parametrize(("architecture", "says"), [("llama", "adds some"), ("bert", "has none for this architecture")])
def test_tables_are_offered_to_architectures_that_can_have_them(architecture, says, tmp_path):
    path = tmp_path / "m.gguf"
    keys = {key.replace("llama.", f"{architecture}."): value for key, value in MODEL.items()}
    path.write_bytes(gguf_bytes({**keys, "general.architecture": architecture}))
    shown = CliRunner().invoke(main, [str(path)]).stdout
    assert f"none: runs as in llama.cpp; clex-convert {says}" in shown


@pytest.mark.parametrize(
    ("architecture", "window", "says"),
    [
        ("cohere2", 32, "its layers that see every token have no RoPE, so it needs none"),
        ("smallthinker", 32, "its layers that see every token have no RoPE, so it needs none"),
        ("gemma3", 32, "clex-convert adds some"),
        ("llama", 32, "its layers attend to the last 32 tokens only, which llama.cpp does not compute"),
        ("llama", 64, "clex-convert adds some"),
    ],
)
def test_a_window_decides_whether_tables_are_offered(architecture, window, says, tmp_path):
    path = tmp_path / "m.gguf"
    keys = {key.replace("llama.", f"{architecture}."): value for key, value in MODEL.items()}
    keys |= {"general.architecture": architecture, f"{architecture}.attention.sliding_window": np.uint32(window)}
    path.write_bytes(gguf_bytes(keys))
    shown = " ".join(CliRunner().invoke(main, [str(path)]).stdout.split())
    assert f"none: runs as in llama.cpp; {says}" in shown


def test_its_own_scaling_is_shown(tmp_path):
    scaling = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": np.float32(4)}
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes({**MODEL, **scaling}, {"rope_freqs.weight": np.ones(4, np.float32)}))
    assert inspect(path).rope.scaling == {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    assert "rope.scaling.type = yarn, rope.scaling.factor = 4.0, rope_freqs.weight" in run(path)


@pytest.fixture
def longrope(tmp_path):
    """A Phi-3 with LongRoPE factors, of keys and tensors alone: its layers cannot be computed with."""
    keys, tensors = model_parts(tables=False)
    keys = {key.replace("llama.", "phi3."): value for key, value in keys.items()}
    keys |= {"general.architecture": "phi3", "phi3.context_length": np.uint32(300)}
    keys["phi3.rope.scaling.original_context_length"] = np.uint32(64)
    keys["phi3.rope.scaling.attn_factor"] = np.float32(1.25)
    for i in range(2):
        qkv = [tensors.pop(f"blk.{i}.attn_{name}.weight") for name in "qkv"]
        tensors[f"blk.{i}.attn_qkv.weight"] = np.concatenate(qkv)
        gate = [tensors.pop(f"blk.{i}.ffn_{name}.weight") for name in ("gate", "up")]
        tensors[f"blk.{i}.ffn_up.weight"] = np.concatenate(gate)
    tensors["rope_factors_long.weight"] = np.linspace(1, 6, 16, dtype=np.float32)
    tensors["rope_factors_short.weight"] = np.linspace(1, 1.5, 16, dtype=np.float32)
    path = tmp_path / "phi3.gguf"
    path.write_bytes(gguf_bytes(keys, tensors))
    return path


def test_longrope_factors_become_the_tables_of_the_library(longrope, monkeypatch):
    found, model = inspect(longrope), Model(longrope)
    assert found.tables.method == llama_clex.method(model.pointer) == "longrope"
    assert llama_clex.n_buckets(model.pointer) == len(found.buckets) == 2
    assert not found.tables_in_file
    for i, bucket in enumerate(found.buckets):
        np.testing.assert_allclose(found.tables.inv_freq[i], llama_clex.inv_freq(model.pointer, i), rtol=1e-6)
        assert bucket.factor == llama_clex.scaling_factor(model.pointer, i)
        assert bucket.attn_scale == 1.25**2
    assert [(bucket.first, bucket.last) for bucket in found.buckets] == [(1, 64), (65, 300)]
    assert llama_clex.max_context(model.pointer) == found.max_context == 300
    model.close()
    assert "2 made of the LongRoPE factors" in run(longrope)
    monkeypatch.setenv("LLAMA_CLEX_LONGROPE_DISABLE", "1")
    assert inspect(longrope).tables is None
    assert "rope_factors_short.weight" in run(longrope)


def test_the_parts_of_a_split_model(tmp_path):
    first = with_keys(tmp_path / "1.gguf", split__no=np.uint16(0), split__count=np.uint16(3))
    assert inspect(first).part == (1, 3)
    assert "part 1 of 3" in run(first)
    other = tmp_path / "2.gguf"
    other.write_bytes(gguf_bytes({"split.no": np.uint16(1), "split.count": np.uint16(3)}))
    assert "part 2 of 3 of a split model; inspect its first part" in refused(other)


# how it is shown


def test_json_is_one_line_for_each_file_and_always_has_the_same_keys(smollm_ntk, smollm, tmp_path):
    plain = with_keys(tmp_path / "plain.gguf")
    lines = run(smollm_ntk, smollm, plain, "--json").splitlines()
    values = [json.loads(line) for line in lines]
    assert [value["path"] for value in values] == [str(smollm_ntk), str(smollm), str(plain)]
    documented = PAGE.read_text(encoding="utf-8")

    def names(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(names, value))
        return set(value).union(*map(names, value.values())) if isinstance(value, dict) else set()

    for value in values:
        assert set(value) == set(values[0])
        free = {"provenance", "scaling", "kv_bytes"}
        fixed = {key: entry for key, entry in value.items() if key != "tables"}
        fixed["tables"] = {key: entry for key, entry in (value["tables"] or {}).items() if key not in free}
        fixed["rope"] = {**value["rope"], "scaling": None}
        contexts = [{**entry, "kv_bytes": None} for entry in value["memory"]["contexts"]]
        fixed["memory"] = {**value["memory"], "contexts": contexts}
        assert {name for name in names(fixed) if f"`{name}`" not in documented} == set()
    assert values[0]["tables"]["buckets"][1] == {"first": 8193, "last": 16384, "factor": 2.0, "attn_scale": 1.0}
    assert values[1]["tables"] is None
    assert values[2]["memory"]["contexts"] == []


def test_a_pipe_gets_plain_text(smollm_ntk):
    command = [sys.executable, "-m", "clex_local.inspection.cli", smollm_ntk]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "FORCE_COLOR": ""})
    assert done.stdout.replace("\n", "").isprintable()
    assert done.stderr == ""
    assert not re.search(" $", done.stdout, re.MULTILINE)


def test_many_buckets_are_shortened_for_people_alone(tmp_path):
    path = make_model(tmp_path / "m.gguf", n_buckets=500)
    assert len(run(path).splitlines()) < 120
    assert len(json.loads(run(path, "--json"))["tables"]["buckets"]) == 500


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    keys = read_tables(make_model(tmp_path / "m.gguf")).metadata()
    keys |= {"clex.method": "\x1b]0;x\x07", "clex.provenance": '{"\\u001b[2J": "\\ud800"}'}
    name = "a\x1b[31mb\u202e\n[red]$^$"
    path = rewrite(tmp_path / "m.gguf", tmp_path / "n.gguf", {**keys, "general.name": name})
    text = run(path)
    assert text.replace("\n", "").isprintable()
    assert "a\\x1b[31mb\\u202e\\n[red]$^$" in text
    assert json.loads(run(path, "--json"))["name"] == name
    run(path, "--plot", tmp_path / "n.png")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("not JSON", "not JSON"), ('{"a": NaN}', '{"a": NaN}'), ("[" * 10**5, None), ('{"a": [1]}', {"a": [1]})],
)
def test_provenance_is_json_or_text(tmp_path, text, shown):
    path = rewrite(make_model(tmp_path / "m.gguf"), tmp_path / "n.gguf", {"clex.provenance": text})
    value = json.loads(run(path, "--json"))["tables"]["provenance"]
    assert value == shown or (shown is None and len(value) < len(text))
    assert len(run(path)) < 4000


# what is refused


def test_what_cannot_be_inspected(tmp_path):
    missing = tmp_path / "none.gguf"
    assert f"{missing}: cannot be read (No such file" in refused(missing)
    assert f"{tmp_path}: cannot be read (Is a directory" in refused(tmp_path)
    no_model = tmp_path / "m.gguf"
    no_model.write_bytes(gguf_bytes({"a": np.uint32(1)}))
    assert "not a model (general.architecture is None)" in refused(no_model)
    bad = with_keys(tmp_path / "b.gguf", clex__version=np.uint32(1))
    assert "clex.method is missing; convert the model again" in refused(bad)
    assert "--ctx" in refused(no_model, "--ctx", 0, code=2)
    assert "--kv-type" in refused(no_model, "--kv-type", "q9", code=2)
    with pytest.raises(ClexError, match="'q9' is no type of cache"):
        inspect(no_model, kv_types=["q9"])


@pytest.mark.parametrize(
    "changes",
    [
        {"llama.block_count": np.uint32(2**32 - 1)},
        {"llama.attention.head_count": np.uint32(0)},
        {"llama.attention.key_length": "long"},
        {"llama.attention.kv_lora_rank": np.array([1, 0], np.uint32)},
        {"llama.embedding_length": np.float32("inf")},
        {"llama.attention.head_count_kv": np.array([-1, -1], np.int32)},
    ],
)
def test_a_shape_that_is_none_has_no_memory(tmp_path, changes):
    path = rewrite(make_model(tmp_path / "m.gguf"), tmp_path / "n.gguf", changes)
    found = inspect(path)
    assert (found.shape, found.memory) == (None, ())
    assert len(found.buckets) == 4


def test_a_vocabulary_that_cannot_encode_is_one_error(tmp_path):
    tokens = {"tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"], "tokenizer.ggml.scores": np.zeros(3, np.float32)}
    keys, tensors = model_parts(n_layer=1)
    tensors |= {name: tensors[name][:3] for name in ("token_embd.weight", "output.weight")}
    keys |= {**tokens, "tokenizer.ggml.token_type": np.array([1, 1, 1], np.int32), "llama.vocab_size": np.uint32(3)}
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(keys, tensors))
    llm = Llama(str(path), verbose=False)
    with pytest.raises(ClexError, match=r"m\.gguf: its vocabulary cannot encode the text"):
        llm.tokenize(b"hello")
    llm.close()


# the picture


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_file_gives_the_same_picture(smollm_ntk, tmp_path, kind, monkeypatch):
    pictures = []
    for name in "ab":
        run(smollm_ntk, "--plot", tmp_path / f"{name}.{kind}")
        pictures.append((tmp_path / f"{name}.{kind}").read_bytes())
        monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 9)  # a taste of the user's
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{kind}", f"b.{kind}"]


def shown_texts(picture: Path) -> set[str]:
    """What the comments of an SVG say it shows; letters are drawn as paths."""
    return set(re.findall(r"<!-- (.*?) -->", picture.read_text(encoding="utf-8")))


@pytest.mark.parametrize("buckets", [1, 4, 32, 200])
def test_every_number_of_buckets_can_be_drawn(tmp_path, buckets):
    path = make_model(tmp_path / "m.gguf", n_buckets=buckets, original=4096, head=128)
    run(path, "--plot", tmp_path / "m.svg")
    texts = shown_texts(tmp_path / "m.svg")
    assert "wavelength = 4,096 tokens" in texts
    assert ("t = 1: up to 4,096 tokens" in texts) == (buckets <= 8)
    assert ("scaling factor t of the bucket" in texts) == (buckets > 8)
    ElementTree.parse(tmp_path / "m.svg")


def test_the_dimensions_that_extrapolate_begin_where_the_wavelength_is_the_context(tmp_path):
    from matplotlib.figure import Figure

    from clex_local.inspection.plot import _draw

    base, head, original = 10000.0, 64, 2048
    found = inspect(make_model(tmp_path / "m.gguf", base=base, head=head, original=original))
    axes = Figure().subplots()
    _draw(axes, found)
    boundary = next(patch for patch in axes.patches).get_x()
    assert boundary == pytest.approx(head / 2 * np.log(original / (2 * np.pi)) / np.log(base), abs=1e-3)
    curves = [line.get_ydata() for line in axes.lines if str(line.get_label()).startswith("t = ")]
    np.testing.assert_allclose(curves, found.tables.inv_freq / found.tables.inv_freq[0], rtol=1e-6)
    line = next(line for line in axes.lines if line.get_label() == f"wavelength = {original:,} tokens")
    # A frequency on the line turns once in the original context.
    np.testing.assert_allclose(line.get_ydata() * found.tables.inv_freq[0] * original, 2 * np.pi, rtol=1e-6)


def test_models_are_compared_side_by_side(smollm_ntk, tmp_path):
    run(smollm_ntk, make_model(tmp_path / "m.gguf"), "--plot", tmp_path / "c.svg")
    texts = shown_texts(tmp_path / "c.svg")
    assert {"wavelength = 8,192 tokens", "wavelength = 64 tokens"} < texts


def test_pictures_that_cannot_be_made(smollm_ntk, smollm, tmp_path, monkeypatch):
    assert "pictures are written as .png or .svg" in refused(smollm_ntk, "--plot", tmp_path / "a.pdf")
    assert "has no tables to draw" in refused(smollm, "--plot", tmp_path / "a.png")
    assert "could not be written (No such file" in refused(smollm_ntk, "--plot", tmp_path / "none" / "a.png")
    (tmp_path / "folder.png").mkdir()
    assert "could not be written (Is a directory" in refused(smollm_ntk, "--plot", tmp_path / "folder.png")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]
    found = inspect(smollm_ntk)
    with pytest.raises(ClexError, match="1 to 6 models, not 7"):
        plot([found] * 7, tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'clex-local[plot]'" in refused(smollm_ntk, "--plot", tmp_path / "a.png")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_nothing(smollm_ntk, tmp_path):
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from clex_local.inspection.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", script, smollm_ntk, "--plot", tmp_path / "a.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"clex-inspect: error: {tmp_path / 'a.png'}: could not be written (File too large)\n"
    assert list(tmp_path.iterdir()) == []


def test_the_picture_in_the_page_is_what_its_commands_make(smollm, tmp_path):
    command = re.search(r"^clex-inspect long\.gguf --plot docs/(\S+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert command
    picture = PAGE.parent / command[1]
    made = tmp_path / picture.name
    convert(smollm, tmp_path / "long.gguf", check="none")
    run(tmp_path / "long.gguf", "--plot", made)
    if matplotlib.__version__ == "3.11.2":  # other versions place things a little differently
        assert made.read_bytes() == picture.read_bytes()
