"""What `make` tells CMake."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.native, pytest.mark.skipif(not shutil.which("make"), reason="needs make")]


@pytest.mark.parametrize("by", ["environment", "command line"])
def test_stock_is_configured_with_the_arguments_that_pip_takes_from_cmake_args(tmp_path: Path, by: str) -> None:
    (tmp_path / "Makefile").symlink_to(ROOT / "Makefile")
    for name in ("CMakeLists.txt", "native/llama-cpp-python.txt", "native/fetch_source.py", ".venv/.ready"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    cmake = tmp_path / ".venv" / "bin" / "cmake"
    cmake.parent.mkdir()
    cmake.write_text('#!/bin/sh\nprintf "<%s>" "$@" >> arguments\nmkdir -p build/stock\n')
    cmake.chmod(0o755)
    arguments = '-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=89;90 -DCMAKE_CXX_FLAGS="-O2 -g"'
    # nothing of a make that runs these tests
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "CMAKE"))}
    told = [f"CMAKE_ARGS={arguments}"] if by == "command line" else []
    if by == "environment":
        env["CMAKE_ARGS"] = arguments
    done = subprocess.run(
        ["make", "-o", ".venv/.ready", "stock", *told], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    given = (tmp_path / "arguments").read_text()
    assert "<-DGGML_CUDA=ON><-DCMAKE_CUDA_ARCHITECTURES=89;90><-DCMAKE_CXX_FLAGS=-O2 -g>" in given
