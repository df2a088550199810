"""Nothing of the runtime and the converter needs what only POSIX has: modules are imported, and a file converted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.random_gguf import make_model

pytestmark = [pytest.mark.runtime, pytest.mark.convert]

# As on Windows: what others import is theirs.
CODE = """
import builtins, importlib, pkgutil, signal, sys, types

found = builtins.__import__
def without_posix(name, globals=None, *rest):
    importer = (globals or {}).get("__name__", "")
    if importer.startswith("clex_") and name in ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty"):
        raise ImportError(name)
    return found(name, globals, *rest)

builtins.__import__ = without_posix
class Signals:
    def __getattr__(self, name):
        if name in ("SIGKILL", "SIGHUP", "SIGPROF", "SIGALRM", "SIGUSR1", "setitimer", "alarm", "pthread_sigmask"):
            raise AttributeError(name)
        return getattr(signal, name)

import clex_convert, clex_local
for package in (clex_local, clex_convert):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if "_llama_cpp" not in module.name and "_bindings" not in module.name and not module.name.endswith("__main__"):
            imported = importlib.import_module(module.name)
            if getattr(imported, "signal", None) is signal:
                imported.signal = Signals()
import clex_convert.output
clex_convert.output.sys = types.SimpleNamespace(platform="win32")
clex_convert.convert(sys.argv[1], sys.argv[2], method="ntk")
from clex_convert.child_process import _reason
assert "killed" not in _reason(["it failed"], 1)
"""


def test_what_only_posix_has_is_not_needed(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model.gguf", tables=False)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(model), str(tmp_path / "out.gguf")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.gguf").is_file()
    assert not list(tmp_path.glob(".*.tmp"))
