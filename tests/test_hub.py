"""Models of the hub: huggingface_hub's own code against a small server that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import clex_convert
from clex_convert.hub_client import forget_sessions
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.tables import read_tables
from helpers.gguf_maker import MODEL, gguf_bytes

pytestmark = [pytest.mark.convert, pytest.mark.folders]

LLAMA = Path(__file__).parent / "data" / "llama"
COMMAND = "from clex_convert.cli import main; main()"
COMMIT, OLD = "c0" * 20, "01d" * 13 + "0"


class Hub:
    """Repositories by name, each with its files by revision; what was asked for; and what goes wrong."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.broken_after: int | None = None  # bytes of an answer
        self.sent: list[tuple[str, str | None]] = []
        self.requests = 0
        self.status = 200

    def add(self, repo: str, files: dict[str, bytes], **revisions: dict[str, bytes]) -> None:
        self.repos[repo] = {"main": files, COMMIT: files, **revisions}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", sent: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
        if sent is not None:
            self.wfile.flush()
            self.close_connection = True

    def do_GET(self) -> None:
        hub, parts = self.hub, self.path.partition("?")[0].strip("/").split("/")
        hub.requests += 1
        if hub.status != 200:
            return self._answer(hub.status)
        listing = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if listing else parts[:2])
        if repo not in hub.repos or (not listing and len(parts) < 4):
            return self._answer(401, X_Error_Code="RepoNotFound")
        revision = (parts[5] if len(parts) > 5 else "main") if listing else parts[3]
        files = hub.repos[repo].get(revision)
        if files is None:
            return self._answer(404, X_Error_Code="RevisionNotFound")
        commit = OLD if files is hub.repos[repo].get(OLD) else COMMIT
        if listing:
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}).encode()
            return self._answer(200, body, Content_Type="application/json")
        if repo in hub.gated:
            return self._answer(403, X_Error_Code="GatedRepo")
        name = "/".join(parts[4:])
        if name not in files:
            return self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        data = files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if self.command == "HEAD":
            return self._answer(200, data, **headers)
        wanted = self.headers.get("Range")
        hub.sent.append((name, wanted))
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if wanted:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        sent = None if hub.broken_after is None else max(hub.broken_after - start, 0)
        self._answer(206 if wanted else 200, data[start:], sent, **headers)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Hub, Callable[..., subprocess.CompletedProcess[str]]]]:
    """A hub, and the command with that hub and an empty cache."""
    contents = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"hub": contents}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    (tmp_path / "work").mkdir()

    def run(
        *arguments: object, code: str = COMMAND, file_size: int | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            **variables,
        }

        def limit() -> None:
            if file_size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path / "work",
            env=environment,
            preexec_fn=limit,
            check=False,
        )

    yield contents, run
    server.shutdown()
    thread.join()
    server.server_close()


def small_files() -> dict[str, bytes]:
    names = ("config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json")
    return {name: (LLAMA / name).read_bytes() for name in names}


def sharded(folder: Path) -> dict[str, bytes]:
    tensors, folder = load_file(LLAMA / "model.safetensors"), folder / "shards"
    folder.mkdir()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for part, part_names in shards.items():
        save_file({name: tensors[name] for name in part_names}, folder / part)
    index = {"weight_map": {name: part for part, part_names in shards.items() for name in part_names}}
    return {
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{part: (folder / part).read_bytes() for part in shards},
    }


JUNK = (
    *("pytorch_model.bin", "model.fp16.safetensors", "original/consolidated.00.pth", "onnx/model.onnx", "tf_model.h5"),
    *(".gitattributes", "original/tokenizer.model", "training_args.bin"),
)


FETCH = "import sys, clex_convert.hub; print(clex_convert.hub.fetch(sys.argv[1]))"


def test_a_model_is_downloaded_once_and_no_more_of_it_than_needed(hub, tmp_path: Path) -> None:
    contents, run = hub
    needed = {**small_files(), **sharded(tmp_path), "additional_chat_templates/rag.jinja": b"{{ messages }}"}
    contents.add("org/name", {**needed, **dict.fromkeys(JUNK, b"junk")})
    done = run("org/name", code=FETCH)
    assert done.stderr == ""
    folder = Path(done.stdout.strip())
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == needed
    assert sorted(name for name, _ in contents.sent) == sorted(needed)
    requests = contents.requests
    again = run("org/name@main", code=FETCH, HF_HUB_OFFLINE="1")
    assert (again.stdout, contents.requests) == (done.stdout, requests)
    contents.sent.clear()
    assert run("org/name", code=FETCH).stdout == done.stdout
    assert contents.sent == []


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to reach another machine; each fails."""
    tried: list[Any] = []

    def look_up(*address: Any, **options: Any) -> None:
        tried.append(address)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return tried


def test_a_model_in_the_cache_is_converted_without_a_network(
    tmp_path: Path, golden_gguf, connections: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "hub" / "models--org--Tiny-LLaMA"
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs/main").write_text(COMMIT)
    for name, data in {**small_files(), **sharded(tmp_path)}.items():
        digest = hashlib.sha256(data).hexdigest()
        (repo / "blobs" / digest).write_bytes(data)
        (repo / "snapshots" / COMMIT / name).symlink_to(f"../../blobs/{digest}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for offline in (True, False):  # said to be, and found to be
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        forget_sessions()
        out = tmp_path / f"{offline}.gguf"
        clex_convert.convert("org/Tiny-LLaMA", out, outtype="f32")
        assert bool(connections) != offline
        with GGUFFile(out) as file, GGUFFile(golden_gguf("llama")) as known:
            assert file.tensors == known.tensors
            assert file.get("general.name") == "Tiny LLaMA"
    forget_sessions()


def test_a_folder_of_that_name_wins_and_needs_no_network(
    tmp_path: Path, golden_gguf, connections: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(LLAMA, tmp_path / "org" / "llama")
    monkeypatch.chdir(tmp_path)
    clex_convert.convert("org/llama", "out.gguf", outtype="f32")
    assert (tmp_path / "out.gguf").read_bytes() == golden_gguf("llama").read_bytes()
    assert connections == []


def test_a_revision_and_bin_where_there_is_nothing_better(hub, tmp_path: Path) -> None:
    contents, run = hub
    old = {**small_files(), "pytorch_model.bin": b"bin", "flax_model.msgpack": b"junk"}
    contents.add("org/name", {}, **{OLD: old, "v1.0": old})
    assert run("org/name@v1.0", code=FETCH).returncode == 0
    assert sorted(name for name, _ in contents.sent) == sorted(set(old) - {"flax_model.msgpack"})
    assert (tmp_path / "home/hub/models--org--name/refs/v1.0").read_text() == OLD


def test_one_gguf_file_of_many(hub, tmp_path: Path) -> None:
    contents, run = hub
    data = gguf_bytes(MODEL)
    split = {f"f16-0000{number}-of-00002.gguf": b"part %d" % number for number in (1, 2)}
    contents.add("org/name-GGUF", {"README.md": b"", "a-q4.gguf": data, "b/q8.gguf": data, **split})
    listed = run("org/name-GGUF", "out.gguf")
    assert check_line(listed).endswith("pick one as org/name-GGUF/FILE: a-q4.gguf, b/q8.gguf, f16-00001-of-00002.gguf")
    done = run("org/name-GGUF/b/q8.gguf", "out.gguf", "--method", "ntk", "--check", "none")
    assert done.returncode == 0, done.stderr
    assert contents.sent == [("b/q8.gguf", None)]
    assert read_tables(tmp_path / "work" / "out.gguf") is not None
    contents.sent.clear()
    assert Path(run("org/name-GGUF/f16-00002-of-00002.gguf", code=FETCH).stdout.strip()).name in split
    assert [name for name, _ in contents.sent] == list(split)


def test_a_download_that_broke_off_goes_on(hub, tmp_path: Path) -> None:
    contents, run = hub
    chunk = 10 * 2**20  # what the client writes at once
    contents.add("org/name", {"q8.gguf": gguf_bytes(MODEL, {"a.weight": np.arange(chunk // 3, dtype=np.float32)})})
    contents.broken_after = chunk + 1000
    arguments = ("org/name/q8.gguf", "out.gguf", "--method", "ntk", "--check", "none")
    assert "the download broke off" in check_line(run(*arguments))
    assert list((tmp_path / "work").iterdir()) == []
    contents.broken_after = None
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    # Clients before release 1 go on in the next run, later ones in the same, and begin again in the next.
    assert contents.sent[0] == ("q8.gguf", None)
    assert ("q8.gguf", f"bytes={chunk}-") in contents.sent


def check_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines), done.stdout) == (1, 1, ""), done.stderr
    assert lines[0].startswith("clex-convert: error: ")
    return lines[0]


REFUSED = {
    "org/none": "org/none: no such file or folder, and no such repository at http://127",
    "org/name@v9": "org/name@v9: the repository has no revision v9",
    "org/name/none.gguf": "org/name/none.gguf: the repository org/name has no such file",
    "org/gated": "then log in with: hf auth login",
    "org/adapter": "holds an adapter, not a model; download it and pass its folder with --lora",
    "org/name": "org/name: holds no weights",
    "org/lies": "lists ../../x.safetensors, which is not there",
    "org/-.-name": "no name of a repository",
    "name": "name: no such file or folder",
    "models/name.gguf": "models/name.gguf: no such file or folder",
}
ALL = """
import json, sys, click.testing
from clex_convert.cli import main
runs = [click.testing.CliRunner().invoke(main, [source, "out.gguf"]) for source in sys.argv[1:]]
print(json.dumps([[run.exit_code, run.stderr] for run in runs]))
"""


def test_what_cannot_be_had(hub, tmp_path: Path) -> None:
    contents, run = hub
    contents.add("org/name", {"README.md": b""})
    contents.add("org/gated", small_files() | {"model.safetensors": b""})
    contents.add("org/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    index = json.dumps({"weight_map": {"x": "../../x.safetensors"}}).encode()
    contents.add("org/lies", {"model.safetensors.index.json": index})
    contents.gated.add("org/gated")
    done = run(*REFUSED, code=ALL)
    assert done.stderr == ""
    for (code, errors), source in zip(json.loads(done.stdout), REFUSED, strict=True):
        assert (code, len(errors.splitlines())) == (1, 1)
        assert REFUSED[source] in errors
    assert list((tmp_path / "work").iterdir()) == []


def test_no_network_no_room_and_a_hub_out_of_order(hub, tmp_path: Path) -> None:
    contents, run = hub
    contents.add("org/name", {"q8.gguf": b"x" * 300_000})
    arguments = ("org/name/q8.gguf", "out.gguf")
    offline = check_line(run(*arguments, HF_HUB_OFFLINE="1"))
    assert "not all of it is in the hub's cache; HF_HUB_OFFLINE forbids downloads" in offline
    assert contents.requests == 0
    nobody = check_line(run(*arguments, HF_ENDPOINT="http://127.0.0.1:9"))
    assert "and http://127.0.0.1:9 cannot be reached; check the name and the network" in nobody
    full = check_line(run(*arguments, file_size=100_000))
    assert "the disk is full or a size limit was reached" in full
    contents.status = 500
    assert "answered 500; try again later" in check_line(run(*arguments))
