"""Our kernels compile for the processors that a wheel has variants for, not only for the one at hand."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "native" / "src" / "cpu").glob("*.cpp"))
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
VARIANTS = re.findall(r"set\(clex_variants ([^)]+)\)", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))[0].split()
# What llama.cpp calls features, as GCC and Clang do.
FLAGS = {
    "SSE42": "-msse4.2",
    "AVX512": "-mavx512f -mavx512cd -mavx512vl -mavx512dq -mavx512bw",
    **{name: f"-m{name.lower().replace('_', '')}" for name in ("AVX", "F16C", "FMA", "AVX2", "BMI2", "AVX_VNNI")},
    **{name: f"-m{name.lower().replace('_', '')}" for name in ("AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16")},
    **{name: f"-m{name.lower().replace('_', '-')}" for name in ("AMX_TILE", "AMX_INT8")},
}

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="variants of x86-64"),
    pytest.mark.skipif(sys.platform == "win32" or COMPILER is None, reason="needs GCC or Clang"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The patched llama.cpp."""
    folder = tmp_path_factory.mktemp("source") / "llama.cpp"
    subprocess.run([sys.executable, str(ROOT / "native" / "fetch_source.py"), str(folder)], check=True)
    return folder


def compile_for(source: Path, variant: str, *options: str) -> subprocess.CompletedProcess[str]:
    """All kernels with the instructions of a variant."""
    lists = (source / "ggml" / "src" / "CMakeLists.txt").read_text(encoding="utf-8")
    features = re.findall(rf"ggml_add_cpu_backend_variant\({variant}\b([^)]*)\)", lists)[0].split()
    flags = " ".join(FLAGS[name] for name in features).split()
    ggml = source / "ggml"
    includes = [f"-I{folder}" for folder in (ggml / "include", ggml / "src", ggml / "src" / "ggml-cpu")]
    command = [str(COMPILER), "-std=gnu++17", *options, *flags, *includes, *map(str, KERNELS)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_compile_for(source: Path, variant: str) -> None:
    done = compile_for(source, variant, "-fsyntax-only")
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert not errors, "\n".join(errors[:5])
    assert done.returncode == 0, done.stderr[:1000]


def test_nothing_is_computed_when_a_variant_is_loaded(source: Path, tmp_path: Path, monkeypatch) -> None:
    """ggml loads every variant to ask it whether the processor can run it."""
    monkeypatch.chdir(tmp_path)
    assert compile_for(source, "haswell", "-O0", "-S").returncode == 0
    assembly = {path.stem: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.s")}
    assert len(assembly) == len(KERNELS)
    assert not [name for name, text in assembly.items() if re.search(r"\.init_array|_GLOBAL__sub_I|\.ctors", text)]
