"""AMX: the tile configuration of a thread is loaded for each of our products, whoever else in the process uses it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from clex_convert import convert
from clex_local.library.loading import library_path
from helpers.random_gguf import make_model

CPUINFO = Path("/proc/cpuinfo")
FLAGS = CPUINFO.read_text() if CPUINFO.exists() else ""

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif("amx_int8" not in FLAGS, reason="this CPU has no AMX"),
    pytest.mark.skipif(
        b"AMX_INT8 = 1" not in llama_cpp.llama_print_system_info(), reason="the library was built without AMX"
    ),
]

# In a process of its own, which an illegal instruction ends. Machine code, so that nothing depends on what another
# library makes of its products: tilerelease; sttilecfg [rdi]; ldtilecfg [rdi].
SCRIPT = """
import ctypes, mmap, sys
import numpy as np, llama_cpp

path, out, other = sys.argv[1:4]
llm = llama_cpp.Llama(path, n_ctx=256, n_threads=2, n_threads_batch=2, verbose=False, logits_all=True)

def code(hexadecimal):
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(bytes.fromhex(hexadecimal))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
    function.memory = memory
    return function

release, store, load = (code(x) for x in ("c4e27849c0c3", "c4e2794907c3", "c4e2784907c3"))
config = (ctypes.c_uint8 * 64)()

def stored():
    store(ctypes.addressof(config))
    return bytes(config)

def evaluate():
    llm.reset()
    llm.eval([1 + i * 37 % 280 for i in range(100)])
    return llm.scores[:100].copy()

results = [evaluate()]
assert not any(stored()), "a configuration was left behind"
for _ in range(2):
    if other == "release":
        release(None)
    elif other == "another":
        small = bytearray(64)
        small[0], small[16], small[48] = 1, 4, 1  # palette 1, tile 0 of one row of four bytes
        load(ctypes.addressof((ctypes.c_uint8 * 64).from_buffer(small)))
    else:
        import torch
        a = torch.randn(256, 256, dtype=torch.bfloat16)
        torch.set_num_threads(2)
        assert torch.isfinite(a @ a).all()
    results.append(evaluate())
np.save(out, np.stack(results))
"""


@pytest.mark.parametrize("library", ["ours", "stock"])
@pytest.mark.parametrize("outtype", ["q8_0", "q4_0", "q4_k_m"])
@pytest.mark.parametrize("other", ["release", "another", "torch"])
def test_products_survive_other_users_of_the_tiles(stock_library, tmp_path, library, outtype, other):
    if other == "torch" and find_spec("torch") is None:
        pytest.skip("torch is not installed")
    model = tmp_path / "model.gguf"
    convert(make_model(tmp_path / "f32.gguf", head=128), model, outtype=outtype)
    folder = library_path() if library == "ours" else stock_library
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model), str(tmp_path / "logits.npy"), other],
        env={**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    results = np.load(tmp_path / "logits.npy")
    assert np.isfinite(results).all()
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])
