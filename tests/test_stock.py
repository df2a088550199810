"""A model without tables against llama.cpp built with the same flags from the source with only the AMX fix.

With GGML_CLEX_ATTN_DISABLE and GGML_CLEX_MATMUL_DISABLE, since attention and products of batches on the CPU have code
of our own, which rounds differently.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.native

CPUINFO = Path("/proc/cpuinfo")
SCRIPT = """
import sys, numpy as np, llama_cpp
path, out = sys.argv[1:3]
results = []
for options in (dict(), dict(flash_attn=True, type_k=8, type_v=8), dict(n_batch=64)):
    llm = llama_cpp.Llama(path, n_ctx=1024, n_threads=2, n_threads_batch=2, verbose=False, logits_all=True, **options)
    llm.eval([1 + i * 37 % 40000 for i in range(300)])
    for token in (5, 6, 7):
        llm.eval([token])
    results.append(llm.scores[250:303].copy())
    llm.close()
np.save(out, np.stack(results))
print(hasattr(llama_cpp.llama_cpp._lib, "llama_clex_bucket"))
"""


def run(library: object, model: object, out: object) -> tuple[np.ndarray, str]:
    environment = {
        **os.environ,
        "LLAMA_CPP_LIB_PATH": str(library),
        "GGML_CLEX_ATTN_DISABLE": "1",
        "GGML_CLEX_MATMUL_DISABLE": "1",
    }
    command = [sys.executable, "-c", SCRIPT, str(model), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(out), done.stdout.strip().splitlines()[-1]


def test_model_without_tables_has_the_logits_of_stock_bit_for_bit(smollm, stock_library, tmp_path):
    from clex_local.library.loading import library_path

    ours, patched = run(library_path(), smollm, tmp_path / "ours.npy")
    stock, stock_patched = run(stock_library, smollm, tmp_path / "stock.npy")
    assert (patched, stock_patched) == ("True", "False")
    assert np.isfinite(stock).all()
    np.testing.assert_array_equal(ours, stock)


def test_stock_runs_a_file_with_tables_inside_its_original_context(smollm, smollm_ntk, stock_library, tmp_path):
    with_tables, _ = run(stock_library, smollm_ntk, tmp_path / "tables.npy")
    plain, _ = run(stock_library, smollm, tmp_path / "plain.npy")
    np.testing.assert_array_equal(with_tables, plain)


@pytest.mark.skipif(not CPUINFO.exists() or "amx_int8" not in CPUINFO.read_text(), reason="this CPU has no AMX")
@pytest.mark.parametrize("disable", [False, True])
def test_quantized_prefill_survives_amx(golden_gguf, tmp_path, disable):
    """Built by GCC, the stock library dies at the first quantized matrix product on a CPU with AMX."""
    from clex_convert import convert

    model = tmp_path / "q8_0.gguf"
    convert(golden_gguf("llama"), model, outtype="q8_0")
    code = f"from clex_local import Llama; Llama({str(model)!r}, n_ctx=0, verbose=False).eval(list(range(3, 200)))"
    environment = {k: v for k, v in os.environ.items() if k != "GGML_AMX_DISABLE"}
    if disable:
        environment["GGML_AMX_DISABLE"] = "1"
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
