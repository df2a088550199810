"""Tables in memory and in GGUF files: what is accepted, what is refused, and which bucket a length gets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clex_local.errors import ClexError
from clex_local.model_file.gguf_file import GGUFError, GGUFFile
from clex_local.model_file.gguf_header import GGUFHeader
from clex_local.model_file.tables import ContextError, Tables, TablesError, read_tables
from helpers.gguf_maker import MODEL, TENSORS, gguf_bytes

pytestmark = [pytest.mark.runtime, pytest.mark.convert]


def some_tables(**changes: Any) -> Tables:
    values: dict[str, Any] = {
        "method": "ntk",
        "original_context_length": 64,
        "scaling_factors": [1, 2, 4],
        "inv_freq": np.geomspace(1, 1e-4, 12).reshape(3, 4),
    }
    return Tables(**{**values, **changes})


GOOD = some_tables().metadata()


def write(path: Path, keys: dict[str, Any], **options: Any) -> Path:
    path.write_bytes(gguf_bytes({**MODEL, **keys}, **options))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made = some_tables(attn_scale=[1, 1.5, 2], log_scale=True, provenance='{"solver": "none"}')
    read = read_tables(write(tmp_path / "m.gguf", made.metadata()))
    assert read is not None
    for name in ("method", "original_context_length", "log_scale", "provenance"):
        assert getattr(read, name) == getattr(made, name)
    for name in ("scaling_factors", "inv_freq", "attn_scale"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
        assert getattr(read, name).dtype == np.float32


def test_absent_options_have_their_defaults(tmp_path: Path) -> None:
    read = read_tables(write(tmp_path / "m.gguf", GOOD))
    assert read is not None
    assert (read.attn_scale, read.log_scale, read.provenance) == (None, False, "")


def test_a_file_without_our_keys_has_no_tables(tmp_path: Path) -> None:
    assert read_tables(write(tmp_path / "m.gguf", {})) is None


F32 = np.float32
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "version of another type": ({"clex.version": np.int32(1)}, "clex.version must have the type u32, not i32"),
    "version zero": ({"clex.version": np.uint32(0)}, "clex.version must be 1, not 0"),
    "newer version": ({"clex.version": np.uint32(7)}, "clex.version is 7, this clex-local reads 1"),
    "method a number": ({"clex.method": np.uint32(1)}, "clex.method must have the type string"),
    "length zero": ({"clex.original_context_length": np.uint32(0)}, "clex.original_context_length must be"),
    "length as text": ({"clex.original_context_length": "64"}, "clex.original_context_length must have the type u32"),
    "factors as double": ({"clex.scaling_factors": np.array([1.0, 2, 4])}, "clex.scaling_factors must have the type"),
    "factors a scalar": ({"clex.scaling_factors": F32(1)}, "clex.scaling_factors must have the type f32[], not f32"),
    "no factors": ({"clex.scaling_factors": np.array([], F32)}, "clex.scaling_factors must hold at least one"),
    "too many factors": (
        {"clex.scaling_factors": np.arange(1, 4098, dtype=F32), "clex.inv_freq": np.ones(4 * 4097, F32)},
        "clex.scaling_factors must not hold more than 4096 factors, not 4097",
    ),
    "first factor": ({"clex.scaling_factors": np.array([2, 3, 4], F32)}, "clex.scaling_factors must start with 1.0"),
    "equal factors": ({"clex.scaling_factors": np.array([1, 2, 2], F32)}, "clex.scaling_factors must ascend"),
    "falling factors": ({"clex.scaling_factors": np.array([1, 3, 2], F32)}, "clex.scaling_factors must ascend"),
    "infinite factor": ({"clex.scaling_factors": np.array([1, 2, np.inf], F32)}, "clex.scaling_factors must be finite"),
    "factor nan": ({"clex.scaling_factors": np.array([1, np.nan, 3], F32)}, "clex.scaling_factors must be finite"),
    "short frequencies": ({"clex.inv_freq": np.ones(11, F32)}, "clex.inv_freq must hold 3 buckets of 4 values, not 11"),
    "long frequencies": ({"clex.inv_freq": np.ones(24, F32)}, "clex.inv_freq must hold 3 buckets of 4 values, not 24"),
    "no frequencies": ({"clex.inv_freq": np.array([], F32)}, "clex.inv_freq must hold"),
    "frequencies as half of the bytes": ({"clex.inv_freq": np.ones(12, np.int16)}, "clex.inv_freq must have the type"),
    "frequency zero": ({"clex.inv_freq": np.r_[np.ones(11), 0].astype(F32)}, "clex.inv_freq must be finite and above"),
    "frequency below": (
        {"clex.inv_freq": np.r_[np.ones(11), -1].astype(F32)},
        "clex.inv_freq must be finite and above",
    ),
    "frequency nan": ({"clex.inv_freq": np.r_[np.ones(11), np.nan].astype(F32)}, "clex.inv_freq must be finite"),
    "frequency infinite": ({"clex.inv_freq": np.r_[np.inf, np.ones(11)].astype(F32)}, "clex.inv_freq must be finite"),
    "frequency huge": (
        {"clex.inv_freq": np.r_[np.ones(11), 1e38].astype(F32)},
        "clex.inv_freq must be from 1.18e-38 to 1e+03, but bucket 2 holds",
    ),
    "attention scale huge": (
        {"clex.attn_scale": np.array([1, 1e38, 1], F32)},
        "clex.attn_scale must be from 0.001 to 1e+03, but bucket 1 holds",
    ),
    "attention scales too few": ({"clex.attn_scale": np.ones(2, F32)}, "clex.attn_scale must hold 3 values, not 2"),
    "attention scale zero": ({"clex.attn_scale": np.array([1, 0, 1], F32)}, "clex.attn_scale must be finite and above"),
    "attention scale nan": ({"clex.attn_scale": np.array([1, np.nan, 1], F32)}, "clex.attn_scale must be finite"),
    "attention scale of another type": ({"clex.attn_scale": np.ones(3, np.float64)}, "clex.attn_scale must have the"),
    "log scale a number": ({"clex.log_scale": np.uint8(1)}, "clex.log_scale must have the type bool, not u8"),
    "provenance a list": ({"clex.provenance": ["a"]}, "clex.provenance must have the type string, not string[]"),
    "more tokens than positions": ({"clex.original_context_length": np.uint32(2**30)}, "must not cover more than"),
    "log scale of one token": (
        {"clex.log_scale": np.bool_(True), "clex.original_context_length": np.uint32(1)},
        "clex.log_scale needs a clex.original_context_length above 1",
    ),
    "architecture": ({"general.architecture": "bert"}, "cannot be used with the architecture 'bert', only with llama"),
    "rotary dimension says otherwise": ({"llama.rope.dimension_count": np.uint32(6)}, "clex.inv_freq must hold 3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named(tmp_path: Path, name: str) -> None:
    changes, message = BROKEN[name]
    path = write(tmp_path / "m.gguf", {**GOOD, **changes})
    with pytest.raises(TablesError) as error:
        read_tables(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key",
    ["clex.version", "clex.method", "clex.original_context_length", "clex.scaling_factors", "clex.inv_freq"],
)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    keys = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(TablesError, match=f"{key} is missing"):
        read_tables(write(tmp_path / "m.gguf", keys))


def test_the_answer_to_a_newer_version_is_not_to_convert_again(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"clex.version": np.uint32(2), "clex.method": np.uint32(5)})
    with pytest.raises(TablesError, match=r"install a newer clex-local$"):
        read_tables(path)


def test_values_that_float32_cannot_hold_are_refused() -> None:
    with pytest.raises(TablesError, match=r"clex\.inv_freq"):
        some_tables(inv_freq=np.full((3, 4), 1e300)).validate()


@pytest.mark.parametrize("length", [0, -1, 2**32, 1.5, True])
def test_an_original_context_must_be_a_count(length: Any) -> None:
    with pytest.raises(TablesError, match=r"clex\.original_context_length"):
        some_tables(original_context_length=length).validate()


@given(st.integers(1, 10**6), st.integers(1, 64), st.integers(0, 10**8))
def test_whole_factors_give_the_bucket_of_the_ceiling(length: int, factors: int, tokens: int) -> None:
    made = some_tables(
        original_context_length=length,
        scaling_factors=np.arange(1, factors + 1),
        inv_freq=np.ones((factors, 1)),
    )
    wanted = max(1, math.ceil(tokens / length)) - 1
    if wanted < factors:
        assert made.bucket(tokens) == made.bucket(tokens, clamp=True) == wanted
    else:
        assert made.bucket(tokens, clamp=True) == factors - 1
        with pytest.raises(ContextError, match=str(length * factors)):
            made.bucket(tokens)


@given(st.lists(st.floats(1, 1000, width=32), max_size=8, unique=True), st.integers(1, 5000), st.integers(0, 10**6))
def test_the_bucket_is_the_first_that_covers_the_tokens(more: list[float], length: int, tokens: int) -> None:
    factors = sorted({1.0, *more})
    made = some_tables(original_context_length=length, scaling_factors=factors, inv_freq=np.ones((len(factors), 1)))
    covering = [i for i, t in enumerate(factors) if t * length >= tokens]
    if covering:
        assert made.bucket(tokens) == covering[0]
    else:
        with pytest.raises(ContextError):
            made.bucket(tokens)


def test_a_length_below_zero_has_no_bucket() -> None:
    with pytest.raises(ContextError):
        some_tables().bucket(-1)


def test_the_header_can_be_changed_and_written(tmp_path: Path) -> None:
    more = {"some.list": ["x", "yä"], "some.text": "z", "some.zeros": ["a\0b"]}  # a vocabulary may have such a token
    path = write(tmp_path / "m.gguf", more)
    with GGUFFile(path) as file:
        assert file.get("some.list") == ["x", "yä"]
        assert file.kind("some.list") == "string[]"
        with GGUFHeader(file) as header:
            header.remove("some.text")
            header.set("some.number", np.int64(-5))
            header.set("some.flag", np.bool_(True))
            for tensor in file.tensors:
                assert header.add_tensor(tensor.name, tensor.shape, tensor.type) == tensor.offset
            with pytest.raises(TypeError, match="no GGUF type for int"):
                header.set("some.number", 5)  # type: ignore[arg-type]
            data = path.read_bytes()[file.data_offset :]
            (tmp_path / "n.gguf").write_bytes(header.encoded() + data)
    assert b"a\0b" in (tmp_path / "n.gguf").read_bytes()
    with GGUFFile(tmp_path / "n.gguf") as file:
        assert "some.text" not in file
        assert (file.get("some.number"), file.get("some.flag"), file.get("none", 3)) == (-5, True, 3)
        assert [(tensor.name, tensor.shape) for tensor in file.tensors] == [("a.weight", (12,)), ("b.weight", (5,))]


SOUND = gguf_bytes({**MODEL, **GOOD})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a GGUF file"),
        (b"PK\3\4 something else", "not a GGUF file"),
        (SOUND[:20], "damaged GGUF file"),
        (SOUND[:200], "damaged GGUF file"),
        (SOUND[:-64], "truncated GGUF file"),
        (b"GGUF" + b"\xff" * 60, "damaged GGUF file"),
        (SOUND[:8] + b"\xff" * 7 + b"\x0f" + SOUND[16:], "damaged GGUF file"),
        (gguf_bytes(MODEL, {"x": TENSORS["a.weight"], "x" * 70: TENSORS["a.weight"]}), "too long"),
    ],
    ids=["empty", "other magic", "header", "keys", "data", "version", "tensor count", "tensor name"],
)
def test_damaged_files_get_one_line(tmp_path: Path, capfd: Any, data: bytes, reason: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(GGUFError) as error:
        read_tables(path)
    assert reason in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_missing_files_and_folders_get_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(GGUFError, match="cannot be read"):
            read_tables(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_does_more_than_raise_our_error(tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, len(SOUND) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(damaged[: data.draw(st.integers(4, len(SOUND)))]))
    try:
        tables = read_tables(path)
    except ClexError:
        return
    if tables is not None:
        tables.validate()
