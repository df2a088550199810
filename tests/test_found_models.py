"""The models that clex-chat finds: made-up folders of Ollama, LM Studio and the hub, and models asked for by name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clex_local import ClexError, open_model
from clex_local.chat.line_editor import history_file
from clex_local.model_file.found_models import found_models, line_of, model_named, model_path
from clex_local.session.folder import sessions_folder
from clex_local.store.cache_folder import cache_folder
from helpers.chat_command import COMMAND
from helpers.random_gguf import make_model

pytestmark = pytest.mark.chat


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with models of every kind; the current folder is in it."""
    home = tmp_path / "home"
    plain, long = make_model(tmp_path / "p.gguf", tables=False), make_model(tmp_path / "l.gguf", seed=1)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    for name in ("OLLAMA_MODELS", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def put(source, *parts):
        target = home.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        return target

    ollama = (".ollama", "models")
    for seed, names in enumerate(
        [
            ("registry.ollama.ai", "library", "llama3.2", "latest"),
            ("registry.ollama.ai", "me", "tuned", "q4"),
            ("hf.co", "org", "model", "Q8_0"),
        ]
    ):
        source = make_model(tmp_path / f"{seed}.gguf", tables=False, seed=10 + seed)
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        put(source, *ollama, "blobs", f"sha256-{digest}")
        manifest = home.joinpath(*ollama, "manifests", *names)
        manifest.parent.mkdir(parents=True, exist_ok=True)
        layers = [
            {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64},
            {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"},
        ]
        manifest.write_text(json.dumps({"layers": layers}))
    put(long, ".lmstudio", "models", "publisher", "Model-GGUF", "Model-Q4_K_M.gguf")
    put(plain, ".lmstudio", "models", "publisher", "Model-GGUF", "mmproj-f16.gguf")
    hub = (".cache", "huggingface", "hub", "models--org--Small-GGUF")
    put(make_model(tmp_path / "h.gguf", tables=False, seed=3), *hub, "snapshots", "abc", "small.gguf")
    put(make_model(tmp_path / "old.gguf", tables=False, seed=4), *hub, "snapshots", "aaa", "small.gguf")
    home.joinpath(*hub, "refs").mkdir()
    home.joinpath(*hub, "refs", "main").write_text("abc")
    put(plain, "here", "plain.gguf")
    (home / "here" / "broken.gguf").write_bytes(b"GGUF and no more")
    (home / "here" / "part-00002-of-00002.gguf").write_bytes(b"")
    monkeypatch.chdir(home / "here")
    return home


def test_every_place_is_looked_at(home):
    found = {model.name: model for model in found_models()}
    assert {name: model.place for name, model in found.items()} == {
        "broken.gguf": "this folder",
        "plain.gguf": "this folder",
        "llama3.2:latest": "Ollama",
        "me/tuned:q4": "Ollama",
        "hf.co/org/model:Q8_0": "Ollama",
        "publisher/Model-GGUF/Model-Q4_K_M.gguf": "LM Studio",
        "org/Small-GGUF/small.gguf": "hub cache",
    }
    assert "/snapshots/abc/" in found["org/Small-GGUF/small.gguf"].path.as_posix()
    line = line_of(found["publisher/Model-GGUF/Model-Q4_K_M.gguf"])
    assert (line.context, line.tables, line.fault) == (256, "ntk", None)
    assert line.size == found["publisher/Model-GGUF/Model-Q4_K_M.gguf"].path.stat().st_size
    assert (line_of(found["plain.gguf"]).context, line_of(found["plain.gguf"]).tables) == (64, None)
    assert "damaged" in line_of(found["broken.gguf"]).fault


def test_folders_that_the_environment_names(home, monkeypatch, tmp_path):
    shutil.move(home / ".ollama" / "models", tmp_path / "models")
    shutil.move(home / ".cache" / "huggingface", tmp_path / "hf")
    assert len(found_models()) == 3
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert len(found_models()) == 7


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("llama3.2", "Ollama"),
        ("llama3.2:latest", "Ollama"),
        ("tuned:q4", "Ollama"),
        ("model-q4_k_m", "LM Studio"),
        ("org/small-gguf", "hub cache"),
        ("org/Small-GGUF/small.gguf", "hub cache"),
        ("plain", "this folder"),
    ],
)
def test_models_by_name(home, name, place):
    path = model_named(name)
    assert next(model.place for model in found_models() if model.path == path) == place


def test_a_file_of_two_programs_has_both_names_and_is_listed_once(home):
    link = home / ".lmstudio" / "models" / "publisher" / "Link-GGUF" / "link.gguf"
    link.parent.mkdir()
    link.symlink_to(model_named("llama3.2"))
    assert len(found_models()) == 7
    assert model_named("link").samefile(model_named("llama3.2"))


def test_names_that_are_none(home):
    with pytest.raises(ClexError, match=r"lama3.2: no such file, and no model .*did you mean llama3.2:latest\?"):
        model_named("lama3.2")
    with pytest.raises(ClexError, match=r"xyz: no such file, .* `clex-chat` without a model lists those there are"):
        model_named("xyz")
    shutil.copytree(home / ".lmstudio" / "models" / "publisher", home / ".lmstudio" / "models" / "other")
    other = home / ".lmstudio" / "models" / "other" / "Model-GGUF" / "Model-Q4_K_M.gguf"
    make_model(other, seed=9)
    with pytest.raises(ClexError, match=r"model-q4_k_m: 2 models have this name: other/.*, publisher/"):
        model_named("model-q4_k_m")


def test_a_manifest_names_nothing_outside(home):
    manifest = home / ".ollama" / "models" / "manifests" / "registry.ollama.ai" / "library" / "evil" / "latest"
    manifest.parent.mkdir()
    for digest in ("../../../here/plain.gguf", 7, "sha256:" + "f" * 64):
        layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": digest}]
        manifest.write_text(json.dumps({"layers": layers}))
        found = [model for model in found_models() if model.name.startswith("evil")]
        assert not found or line_of(found[0]).fault == "No such file or directory"
    for text in ("[]", "{", '{"layers": 1}', "\udcff".encode("utf-8", "surrogatepass").decode("latin-1")):
        manifest.write_text(text)
        assert not [model for model in found_models() if model.name.startswith("evil")]


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes")
def test_what_would_never_end_is_listed_as_that(home):
    digest = "c" * 64
    manifest = home / ".ollama" / "models" / "manifests" / "registry.ollama.ai" / "library" / "pipe" / "latest"
    manifest.parent.mkdir()
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}]
    manifest.write_text(json.dumps({"layers": layers}))
    os.mkfifo(home / ".ollama" / "models" / "blobs" / f"sha256-{digest}")
    (home / ".lmstudio-home-pointer").write_text("/a\0b")
    (found,) = (model for model in found_models() if model.name.startswith("pipe"))
    assert line_of(found).fault == "not a file but a pipe or a device"
    with pytest.raises(ClexError, match="a pipe or a device"):
        open_model("/dev/zero")
    with pytest.raises(ClexError, match="null byte"):
        open_model("/a\0b")


def test_paths_that_cannot_be(home):
    for path in ("~nobody-of-this-name/model.gguf", "x" * 5000, "a\0b"):
        with pytest.raises(ClexError):
            open_model(model_path(Path(path)))


def test_an_account_without_a_home_folder(home, monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where neither HOME nor an entry says one
    for name in ("CLEX_CACHE", "CLEX_SESSIONS", "XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert {model.place for model in found_models()} == {"this folder"}
    assert history_file() is None
    for folder, variable in ((cache_folder, "CLEX_CACHE"), (sessions_folder, "CLEX_SESSIONS")):
        with pytest.raises(ClexError, match=f"there is no home folder: set HOME, or {variable} to a folder"):
            folder()
        monkeypatch.setenv(variable, str(home / "own"))
        assert folder() == home / "own"


def test_the_command_lists_them_and_takes_one(home):
    def run(*arguments):
        return subprocess.run([*COMMAND, *arguments], input="", capture_output=True, text=True, timeout=60)

    result = run()
    assert result.returncode == 0
    rows = [line.split("  ") for line in result.stdout.splitlines()]
    assert rows[0][0] == "MODEL"
    lines = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert lines["publisher/Model-GGUF/Model-Q4_K_M.gguf"][1:] == ["256", "ntk", "LM Studio"]
    assert lines["llama3.2:latest"][1:] == ["64", "-", "Ollama"]
    assert "damaged" in lines["broken.gguf"][3]
    assert "--extend 4x" in result.stderr
    options = ("--threads", "1", "--max-tokens", "1", "--chat-template", "plain", "--no-store", "-p", "Hi")
    assert run("llama3.2", *options).returncode == 0
    missing = run("nothing", *options)
    assert missing.returncode == 1
    assert missing.stderr.startswith("clex-chat: error: nothing: no such file, and no model of this name is found")
    assert "Missing argument MODEL. clex-chat alone lists those there are" in run("-p", "Hi").stderr
