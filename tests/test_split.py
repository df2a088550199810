"""Split GGUF files as sources: the parts become one file, or one line says what is wrong with them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clex_convert
from clex_convert.llama_cpp_scripts import conversion_scripts
from clex_local.errors import ClexError
from clex_local.model_file.gguf_file import GGUFFile
from helpers.gguf_maker import MODEL, TENSORS, gguf_bytes, rewrite, write_split

pytestmark = pytest.mark.convert

COUNT = 3
CONTEXT = {"llama.context_length"}


def part(number: int, count: int = COUNT) -> str:
    return f"model-{number:05d}-of-{count:05d}.gguf"


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Two tensors in three parts, the first of which holds keys alone."""
    return write_split(tmp_path / "parts", [(MODEL, {}), *(({}, {name: TENSORS[name]}) for name in TENSORS)])


def convert(source: Path, **options: Any) -> Path:
    target = source.parent.parent / "out.gguf"
    clex_convert.convert(source, target, **{"method": "ntk", "overwrite": True, "check": "none", **options})
    return target


def contents(path: Path) -> tuple[dict[str, tuple[str | None, str]], dict[str, tuple[tuple[int, ...], int, bytes]]]:
    """Keys, and the bytes of every tensor."""
    data = path.read_bytes()
    with GGUFFile(path) as file:
        keys = {key: (file.kind(key), str(file.get(key))) for key in file.keys()}  # noqa: SIM118
        start = file.data_offset
        tensors = {t.name: (t.shape, t.type, data[start + t.offset : start + t.offset + t.size]) for t in file.tensors}
    return keys, tensors


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_part_gives_the_file_that_the_whole_gives(parts: list[Path], tmp_path: Path, number: int) -> None:
    (tmp_path / "whole").mkdir()
    whole = tmp_path / "whole" / "model.gguf"
    whole.write_bytes(gguf_bytes(MODEL))
    merged = convert(parts[number - 1]).read_bytes()
    assert merged == convert(whole).read_bytes()


def test_parts_made_by_the_gguf_package_are_merged_bit_for_bit(
    golden_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    """Written by the package of llama.cpp's scripts, 5 tensors in a part, and each part with its own padding."""
    source, folder = golden_gguf("llama"), tmp_path / "parts"
    folder.mkdir()
    keys, tensors = contents(source)
    with conversion_scripts() as (_, gguf):
        reader = gguf.GGUFReader(source)
        writer = gguf.GGUFWriter(folder / "model.gguf", "llama", split_max_tensors=5)
        for field in reader.fields.values():
            if not field.name.startswith(("GGUF.", "clex.")) and field.name != "general.architecture":
                kind = field.types[0]
                inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, inner)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data.copy())
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
    paths = sorted(folder.iterdir())
    assert paths[0].name == part(1, len(paths))
    assert len(paths) == -(-len(tensors) // 5)
    merged_keys, merged_tensors = contents(convert(paths[2]))
    assert list(merged_tensors.items()) == list(tensors.items())
    plain = {key: value for key, value in keys.items() if not key.startswith("clex.")}
    assert {key: value for key, value in merged_keys.items() if not key.startswith("clex.")} == plain


def test_a_file_that_was_merged_is_no_part(tmp_path: Path) -> None:
    """llama.cpp's own tool leaves a count of 0."""
    (tmp_path / "parts").mkdir()
    source = tmp_path / "parts" / "merged.gguf"
    source.write_bytes(gguf_bytes({**MODEL, "split.count": np.uint16(0)}))
    assert not [key for key in contents(convert(source))[0] if key.startswith("split.")]


def changed(path: Path, **changes: Any) -> None:
    rewrite(path, path, {key.replace("__", "."): value for key, value in changes.items()})


WRONG: dict[str, tuple[Callable[[list[Path]], Any], str]] = {
    "missing": (lambda p: p[1].unlink(), r"00002-of-00003.gguf: part 2 of the 3 of a split model is missing"),
    "damaged": (lambda p: p[2].write_bytes(p[2].read_bytes()[:100]), r"00003-of-00003.gguf: damaged GGUF"),
    "truncated": (lambda p: p[2].write_bytes(p[2].read_bytes()[:-32]), r"00003-of-00003.gguf: truncated GGUF"),
    "swapped": (lambda p: shutil.copy(p[1], p[2]), r"00003-of-00003.gguf: is part 2 by its key split.no, not part 3"),
    "not a part": (
        lambda p: changed(p[1], split__count=None, split__no=None),
        r"00002-of-00003.gguf: belongs to another model: it is one of 1 parts, not of 3",
    ),
    "another count": (
        lambda p: changed(p[1], split__count=np.uint16(4)),
        r"00002-of-00003.gguf: belongs to another model: it is one of 4 parts, not of 3",
    ),
    "no number": (lambda p: changed(p[1], split__no=None), r"00002-of-00003.gguf: is no part by its key split.no"),
    "another model": (
        lambda p: changed(p[2], general__architecture="phi2"),
        r"00003-of-00003.gguf: belongs to another model than .*00001-of-00003.gguf: its general.architecture is",
    ),
    "another total": (
        lambda p: changed(p[2], split__tensors__count=np.int32(7)),
        r"00003-of-00003.gguf: belongs to another model than .*: its split.tensors.count is another",
    ),
    "tensors missing": (
        lambda p: [changed(path, split__tensors__count=np.int32(7)) for path in p],
        r"00001-of-00003.gguf: the parts hold 2 tensors in all, not 7",
    ),
    "tensor twice": (
        lambda p: p[2].write_bytes(p[2].read_bytes().replace(b"b.weight", b"a.weight")),
        r"00003-of-00003.gguf: holds the tensor a.weight, which model-00002-of-00003.gguf holds too",
    ),
    "renamed": (
        lambda p: p[0].rename(p[0].with_name("model.gguf")),
        r"model.gguf: one of 3 parts of a split model, but its name .* rename it to end in -00001-of-00003.gguf",
    ),
    "count of no type": (lambda p: changed(p[0], split__count="three"), r"split.count must be a number of parts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_parts_that_do_not_fit_are_named(parts: list[Path], name: str) -> None:
    change, reason = WRONG[name]
    change(parts)
    source = min(parts[0].parent.iterdir(), key=lambda path: (path.name != "model.gguf", path.name))
    with pytest.raises(ClexError, match=reason) as error:
        convert(source)
    assert "\n" not in str(error.value)
    assert [path.name for path in parts[0].parent.parent.iterdir()] == ["parts"]


def test_a_part_is_not_overwritten(parts: list[Path]) -> None:
    before = parts[2].read_bytes()
    with pytest.raises(ClexError, match=r"00003-of-00003.gguf: is a part of the source"):
        clex_convert.convert(parts[0], parts[2], method="ntk", overwrite=True)
    assert parts[2].read_bytes() == before


def test_a_folder_that_holds_one_gguf_model_names_it(parts: list[Path]) -> None:
    folder = parts[0].parent
    with pytest.raises(ClexError, match=re.escape(f"has no config.json; convert {parts[0]} in it")):
        convert(folder)
    (folder / "other.gguf").write_bytes(gguf_bytes(MODEL))
    with pytest.raises(ClexError, match=r"has no config.json$"):
        convert(folder)
