"""Which libraries are loaded as backends, and which bindings are found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clex_local import library_path
from clex_local.server.process import server_program

pytestmark = pytest.mark.native

PLANTED = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void executed(void) { fclose(fopen(getenv("PLANTED"), "w")); }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("name", ["libggml-cuda.so", "libggml-cpu-any.so", "libggml-blas.so"])
def test_no_library_of_the_current_directory_is_executed(tmp_path: Path, name: str) -> None:
    source, marker = tmp_path / "planted.c", tmp_path / "executed"
    source.write_text(PLANTED)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / name, source], check=True)
    env = {"PLANTED": str(marker), "PATH": ""}
    done = subprocess.run([server_program(), "--list-devices"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = "import sys; sys.path[:0] = sys.argv[1:]; import clex_local.library.devices as d; d.has_gpu()"
    subprocess.run([sys.executable, "-c", code, *map(str, sys.path)], cwd=tmp_path, env=env, check=True)
    assert not marker.exists()


def test_the_library_has_a_backend_for_this_processor() -> None:
    assert list(library_path().glob("*ggml-cpu*"))
