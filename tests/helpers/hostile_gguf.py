"""Malformed GGUF files, and a process that opens many of them within bounds of time and memory.

``python -m helpers.hostile_gguf MODE FOLDER FIRST LAST`` in tests/ opens files of a folder and prints a JSON line
before and after each.
"""

from __future__ import annotations

import io
import json
import random
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from clex_local import ClexError, Llama, inspect
from clex_local.inspection.report import show
from clex_local.model_file.tables import TablesError, read_tables
from helpers.gguf_maker import MODEL, TENSORS, gguf_bytes, gguf_fields
from helpers.random_gguf import model_parts, ntk_tables

TESTS = Path(__file__).parent.parent
SECONDS = 2  # of processor time for one file
MEMORY = 512 << 20  # bytes of address space that opening it may add

COUNTS = (2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
F32, U32 = np.float32, np.uint32
# One of every kind, with what a careless reader trips over.
VALUES: dict[str, Any] = {
    "u8": np.uint8(0),
    "i32": np.int32(-1),
    "zero": U32(0),
    "one": U32(1),
    "u32-max": U32(2**32 - 1),
    "u32-even": U32(2**32 - 2),
    "billion": U32(2**30),
    "u64-max": np.uint64(2**64 - 1),
    "i64-min": np.int64(-(2**63)),
    "nan": F32("nan"),
    "inf": F32("inf"),
    "f32-zero": F32(0),
    "f32-negative": F32(-1),
    "f64": np.float64(1e300),
    "bool": np.bool_(True),
    "empty-string": "",
    "string": "x\x1b[31m\u202e\n\x9b2J%s%n{}[red]",
    "long-string": "a" * 300_000,
    "invalid-utf8": b"\xff\xfe\x80",
    "nul": "llama\0llama",
    "no-strings": [],
    "strings": ["\x1b]0;x\x07", ""],
    "u32s": np.array([0, 2**32 - 1], U32),
    "f32s": np.array([np.nan, np.inf, -1], F32),
    "many": np.zeros(100_000, U32),
}
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
PROVENANCE = {
    "deep": DEEP,
    "deep-list": "[" * 300_000,
    "long": json.dumps({f"k{i}": "v" * 50 for i in range(20_000)}),
    "digits": '{"n": ' + "9" * 200_000 + "}",
    "nan": '{"a": NaN, "b": Infinity, "c": 1e999}',
    "surrogate": '{"a": "\\ud800", "\\u001b[2J": "\\u001b[31m"}',
    "controls": "\x1b[31mred\r\nline",
    "list": '[1, {"x": [2]}]',
}


def tables(n_buckets: int, n_rot: int, original: int) -> dict[str, Any]:
    """Every key of the tables, optional ones too."""
    return {
        "clex.version": U32(1),
        "clex.method": "ntk",
        "clex.original_context_length": U32(original),
        "clex.scaling_factors": np.arange(1, n_buckets + 1, dtype=F32),
        "clex.inv_freq": ntk_tables(n_buckets, n_rot).reshape(-1),
        "clex.attn_scale": np.ones(n_buckets, F32),
        "clex.log_scale": np.bool_(True),
        "clex.provenance": "{}",
    }


def headers() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys and tensors of a header with a key of every kind; its model cannot be computed with."""
    keys = {**MODEL, "general.name": "tiny", "general.alignment": U32(32), **tables(2, 8, 64)}
    return keys, TENSORS


def models() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys and tensors of a small model that can be computed with, and every key that the inspector reads."""
    keys, tensors = model_parts(n_layer=1, head=32, original=64)
    more = {
        "general.file_type": U32(0),
        "general.alignment": U32(32),
        "llama.attention.key_length": U32(32),
        "llama.attention.value_length": U32(32),
        "llama.rope.scaling.factor": F32(1),
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.original_context_length": U32(64),
        "llama.rope.scaling.attn_factor": F32(1),
        "llama.rope.scale_linear": F32(1),
        "llama.expert_count": U32(0),
        "llama.expert_used_count": U32(0),
        "llama.attention.sliding_window": U32(0),
        "llama.attention.kv_lora_rank": U32(0),
        "general.type": "model",
        "split.count": np.uint16(1),
        "split.no": np.uint16(0),
        "tokenizer.chat_template": "{{ messages }}",
    }
    return {**keys, **more, **tables(4, 32, 64)}, tensors


def truncations() -> Iterator[tuple[str, bytes]]:
    """The tiny header cut at every byte."""
    fields = gguf_fields(*headers())
    data = b"".join(fields.values())
    for size in range(len(data)):
        yield f"{size}-bytes", data[:size]


def cut_models() -> Iterator[tuple[str, bytes]]:
    """The model cut at every boundary of a field."""
    fields, start = gguf_fields(*models()), 0
    data = b"".join(fields.values())
    for name, field in fields.items():
        yield f"before-{name}", data[:start]
        start += len(field)


def counts() -> Iterator[tuple[str, bytes]]:
    """Every count of the format absurd, one at a time."""
    keys, tensors = headers()
    keys["tokenizer.ggml.tokens"] = ["a", "b"]
    fields = gguf_fields(keys, tensors)
    size = sum(map(len, fields.values()))
    for count in (*COUNTS, size, size + 1, size * 8, 0):
        number = struct.pack("<Q", count)

        def changed(name: str, value: bytes) -> bytes:
            return b"".join({**fields, name: value}.values())

        yield f"n_tensors-{count}", changed("n_tensors", number)
        yield f"n_kv-{count}", changed("n_kv", number)
        yield f"key-length-{count}", changed("general.name", number + fields["general.name"][8:])
        for key in ("general.name=", "clex.provenance="):
            yield f"{key}length-{count}", changed(key, fields[key][:4] + number + fields[key][12:])
        for key in ("clex.inv_freq=", "tokenizer.ggml.tokens="):
            yield f"{key}elements-{count}", changed(key, fields[key][:8] + number + fields[key][16:])
        key = "tokenizer.ggml.tokens="
        yield f"element-length-{count}", changed(key, fields[key][:16] + number + fields[key][24:])
        for kind in (0, 1, 5, 7, 8, 10, 12):
            head = struct.pack("<II", 9, kind) + number
            yield f"array-of-{kind}-{count}", changed("clex.inv_freq=", head + fields["clex.inv_freq="][16:])
        yield f"name-length-{count}", changed("a.weight", number + fields["a.weight"][8:])
        yield f"offset-{count}", changed("b.weight.offset", number)
        yield f"first-offset-{count}", changed("a.weight.offset", number)
        for n in range(1, 6):
            dims = struct.pack(f"<I{n}Q", n, *[count] * n)
            yield f"dims-{n}-{count}", changed("b.weight.dims", dims)
            yield f"dims-q4_0-{n}-{count}", changed("b.weight.dims", dims + struct.pack("<I", 2))
            yield f"first-dims-{n}-{count}", changed("a.weight.dims", dims)


def structures() -> Iterator[tuple[str, bytes]]:
    """Types, alignments, offsets, versions and names that the format does not have, and repeated ones."""
    keys, tensors = headers()
    fields = gguf_fields(keys, tensors)
    size = sum(map(len, fields.values()))

    def changed(**values: bytes) -> bytes:
        return b"".join({**fields, **{name.replace("__", "."): value for name, value in values.items()}}.values())

    for version in (0, 1, 2, 4, 0x03000000, 2**32 - 1):
        yield f"version-{version}", changed(version=struct.pack("<I", version))
    for alignment in (0, 1, 3, 31, 33, 64, 2**20, 2**31, 2**32 - 1):
        yield f"alignment-{alignment}", gguf_bytes({**keys, "general.alignment": U32(alignment)}, tensors)
    for name, value in VALUES.items():
        yield f"alignment-{name}", gguf_bytes({**keys, "general.alignment": value}, tensors)
    for offset in (-32, -1, 1, 31, 32, 63, 65, 96, size, size + 32):
        for name in ("a.weight", "b.weight"):
            number = struct.pack("<q", offset)
            yield f"offset-{name}-{offset}", changed(**{f"{name}.offset": number})
    for kind in (4, 5, 31, 36, 40, 41, 255, 2**31, 2**32 - 1):
        yield f"tensor-type-{kind}", changed(**{"b.weight.type": struct.pack("<I", kind)})
    for kind in (9, 13, 14, 255, 2**31, 2**32 - 1):
        start = struct.pack("<I", kind)
        yield f"value-type-{kind}", changed(**{"general.name=": start + fields["general.name="][4:]})
        array = struct.pack("<II", 9, kind) + fields["clex.inv_freq="][8:]
        yield f"array-type-{kind}", changed(**{"clex.inv_freq=": array})
    nested = b"".join(struct.pack("<IIQ", 9, 9, 1) for _ in range(10_000))
    yield "nested-arrays", changed(**{"clex.inv_freq=": nested})
    yield "overlapping", changed(**{"b.weight.offset": fields["a.weight.offset"]})
    yield "same-key", changed(**{"general.name": fields["general.architecture"]})
    yield "same-tensor", changed(**{"b.weight": fields["a.weight"]})
    for name, text in {"empty": b"", "nul": b"a\0b", "invalid": b"\xff\xfe", "escape": b"\x1b[31mx\n"}.items():
        string = struct.pack("<Q", len(text)) + text
        yield f"{name}-key", changed(**{"general.name": string})
        yield f"{name}-key-twice", changed(**{"general.name": string, "general.alignment": string})
        yield f"{name}-tensor", changed(**{"b.weight": string})
        yield f"{name}-tensor-twice", changed(**{"a.weight": string, "b.weight": string})
    for length in (63, 64, 65, 4096):
        yield f"name-{length}", changed(**{"b.weight": struct.pack("<Q", length) + b"x" * length})
    yield "zero-dimensions", changed(**{"b.weight.dims": struct.pack("<I", 0)})
    yield "no-tensors", gguf_bytes(keys, {})
    yield "no-keys", gguf_bytes({}, tensors)
    yield "nothing", gguf_bytes({}, {})
    yield "many-keys", gguf_bytes({**keys, **{f"k{i}": np.uint8(0) for i in range(50_000)}}, tensors)
    yield "many-tensors", gguf_bytes(keys, {f"t{i}": np.zeros(1, F32) for i in range(8_000)})
    yield "many-buckets", gguf_bytes({**keys, **tables(200_000, 8, 64)}, tensors)


def values() -> Iterator[tuple[str, bytes]]:
    """Every key of the model absent, and with every value; then tables and provenance that are more than wrong."""
    keys, tensors = models()
    for key in keys:
        yield f"{key}-absent", gguf_bytes({k: v for k, v in keys.items() if k != key}, tensors)
        for name, value in VALUES.items():
            yield f"{key}-{name}", gguf_bytes({**keys, key: value}, tensors)
    for name, text in PROVENANCE.items():
        yield f"provenance-{name}", gguf_bytes({**keys, "clex.provenance": text}, tensors)
    n = keys["clex.inv_freq"].size
    for name, value in {"nan": np.nan, "inf": np.inf, "zero": 0, "negative": -1, "tiny": 1e-45, "huge": 3e38}.items():
        for key in ("clex.inv_freq", "clex.scaling_factors", "clex.attn_scale"):
            array = keys[key].copy()
            array[-1] = value
            yield f"{key}-ends-{name}", gguf_bytes({**keys, key: array}, tensors)
    yield "one-bucket", gguf_bytes({**keys, **tables(1, 2 * n, 64)}, tensors)


def flips(cases: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """The model with a few bytes of its header changed, inserted or removed."""
    rng = random.Random(seed)
    fields = gguf_fields(*models())
    data, size = b"".join(fields.values()), sum(map(len, fields.values())) - len(fields["data"])
    for case in range(cases):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4, 8))):
            at = rng.randrange(4, size)
            kind = rng.randrange(4)
            if kind == 0:
                del changed[at : at + rng.choice((1, 4, 8))]
            elif kind == 1:
                changed[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
            elif kind == 2:
                changed[at] ^= 1 << rng.randrange(8)
            else:
                changed[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 2**31, 2**32 - 1, rng.getrandbits(32))))
        yield f"flip-{case}", bytes(changed)


def write_sparse(folder: Path) -> None:
    """Files of a terabyte that take no room on the disk, whose counts their size does not refute."""
    keys, tensors = headers()
    fields = gguf_fields(keys, tensors)
    before = b"".join(field for name, field in fields.items() if name in ("magic", "version", "n_tensors", "n_kv"))
    starts = {f"array-of-{kind}": struct.pack("<QBII", 1, 97, 9, kind) for kind in (0, 8, 12)}
    for name, count in {"small": 2**22, "large": 2**30, "huge": 2**37}.items():
        for kind, start in starts.items():
            _write_sparse(folder / f"{kind}-{name}.gguf", before + start + struct.pack("<Q", count))
        _write_sparse(folder / f"string-{name}.gguf", before + struct.pack("<QBIQ", 1, 97, 8, count))
        _write_sparse(folder / f"key-{name}.gguf", before + struct.pack("<Q", count))
        _write_sparse(folder / f"n_kv-{name}.gguf", fields["magic"] + fields["version"] + struct.pack("<QQ", 0, count))
        start = fields["magic"] + fields["version"]
        _write_sparse(folder / f"n_tensors-{name}.gguf", start + struct.pack("<QQ", count, 0))


def _write_sparse(path: Path, head: bytes) -> None:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(1 << 40)


def write(folder: Path, files: Iterator[tuple[str, bytes]]) -> None:
    """Write the files, numbered and named."""
    for number, (name, data) in enumerate(files):
        safe = "".join(c if c.isalnum() or c in "-._" else "_" for c in name)[:100]
        (folder / f"{number:05d}-{safe}.gguf").write_bytes(data)


#
# the process that opens them
#


def read(path: Path) -> None:
    """Its tables alone, then everything; shown where that is most at risk, and for some of the others."""
    with suppress(TablesError):  # the inspector may find something else wrong first
        read_tables(path)
    found = inspect(path)
    json.loads(json.dumps(found.to_json(), allow_nan=False))
    if zlib.crc32(path.name.encode()) % 3 == 0 or any(word in path.name for word in ("name", "clex", "string")):
        text = io.StringIO()
        show(found, Console(file=text, width=200))
        assert text.getvalue().replace("\n", "").isprintable()


def load(path: Path) -> None:
    """The vocabulary alone, then all of it and two tokens."""
    for vocab_only in (True, False):
        with closing(Llama(str(path), n_ctx=256, n_threads=1, vocab_only=vocab_only, verbose=False)) as llm:
            tokens = llm.tokenize(b"a b")
            if not vocab_only:
                llm.eval(tokens)


def convert(path: Path) -> None:
    import clex_convert

    clex_convert.convert(path, path.with_suffix(".out"), method="ntk", overwrite=True, check="none")


MODES: dict[str, Callable[[Path], None]] = {"read": read, "load": load, "convert": convert}


def run(mode: str, paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """Open files in processes of their own; yields each with its outcome.

    An outcome is ``ok``, the one line of a `ClexError`, or starts with ``DIED`` or ``RAISED``.
    """
    left = list(paths)
    while left:
        command = [sys.executable, "-m", "helpers.hostile_gguf", mode, str(left[0].parent), left[0].name, left[-1].name]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=TESTS)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
        for line in lines:
            if "outcome" in line:
                yield left.pop(0), line["outcome"]
        if left:
            assert lines, f"nothing was opened: {done.stderr[-2000:]}"
            yield left.pop(0), f"DIED {done.returncode}: {done.stderr[-1500:]}"


def main(mode: str, folder: str, first: str, last: str) -> None:
    """Open the files of a folder from `first` to `last`."""
    import resource

    open_file = MODES[mode]
    warm = Path(folder).parent / "sound.gguf"  # imports and caches are not the file's doing
    open_file(warm)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for path in sorted(Path(folder).glob("*.gguf")):
        if not first <= path.name <= last:
            continue
        print(json.dumps({"file": path.name}), flush=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process, in C too
        try:
            open_file(path)
            outcome = "ok"
        except ClexError as error:
            outcome = str(error)
            if not outcome.isprintable() or path.stem not in outcome:
                outcome = f"RAISED a message that is not one line about the file: {outcome}"
        except BaseException as error:
            outcome = f"RAISED {type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"outcome": outcome}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
