"""Every type of every tensor: computed with, or refused when the model is loaded, with the tensor's name and type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.gguf_header import GGUFHeader
from helpers.gguf_maker import gguf_bytes
from helpers.random_gguf import model_parts

pytestmark = [pytest.mark.native, pytest.mark.sanitize]

BLOCK = 256  # the largest of any type; rows of the model are as long
TYPES = [*range(4), *range(6, 31), 34, 35, *range(39, 43)]  # those that were taken out of ggml are missing
MATRICES = ("token_embd", "attn_q", "attn_output", "ffn_gate", "output")
VECTORS = ("attn_norm", "output_norm", "attn_q.bias")

CHILD = """
import json, sys
import llama_cpp
import numpy as np
from helpers.low_level import ERROR, Context, logged

out = []
for path in sys.argv[1:]:
    with logged(ERROR) as lines:
        model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if model:
        class Loaded:
            path, pointer = path, model
            n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        with Context(Loaded, n_ctx=256) as context:
            for tokens, position in (([5, 6, 7], 0), ([8], 3)):
                lines.append(bool(np.isfinite(context.feed(tokens, position)).all()))
        llama_cpp.llama_model_free(model)
    out.append([bool(model), lines])
    print(json.dumps([bool(model), lines]), flush=True)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    keys, tensors = model_parts(head=128, n_layer=1, tables=False)
    tensors["blk.0.attn_q.bias"] = tensors["blk.0.attn_norm.weight"] * 0
    path = tmp_path_factory.mktemp("types") / "m.gguf"
    path.write_bytes(gguf_bytes(keys, tensors))
    return path


def with_type(source: Path, target: Path, name: str, kind: int) -> Path:
    """A copy with one tensor of another type, all zeros."""
    original = source.read_bytes()
    with GGUFFile(source) as file, GGUFHeader(file) as header:
        parts = []
        for tensor in file.tensors:
            at = header.add_tensor(tensor.name, tensor.shape, kind if tensor.name == name else tensor.type)
            first = file.data_offset + tensor.offset
            parts.append((at, b"" if tensor.name == name else original[first : first + tensor.size]))
        data = bytearray(header.data_size)
        for at, part in parts:
            data[at : at + len(part)] = part
        target.write_bytes(header.encoded() + data)
    return target


@pytest.mark.parametrize("part", [*MATRICES, *VECTORS])
def test_a_type_without_a_kernel_is_refused_by_name(source, tmp_path, part):
    with GGUFFile(source) as file:
        wanted = {f"{part}.weight", f"blk.0.{part}.weight", f"blk.0.{part}"}
        (name,) = {tensor.name for tensor in file.tensors} & wanted
    paths = [str(with_type(source, tmp_path / f"{kind}.gguf", name, kind)) for kind in TYPES]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *paths], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    answers = [json.loads(line) for line in child.stdout.splitlines()]
    assert child.returncode == 0, (TYPES[len(answers)], child.stderr[-2000:])
    loaded = {kind for kind, (model, _) in zip(TYPES, answers, strict=True) if model}
    for kind, (model, lines) in zip(TYPES, answers, strict=True):
        if model:
            assert all(lines), kind
        else:
            assert any(f"tensor {name} has the type" in line for line in lines), (kind, lines)
    if part in MATRICES:
        assert {0, 1, 2, 8, 12, 20, 30} <= loaded  # F32, F16, Q4_0, Q8_0, Q4_K, IQ4_NL, BF16
        assert not {9, 24, 25, 27, 28} & loaded  # Q8_1, integers, F64
    else:
        assert loaded == {0}
