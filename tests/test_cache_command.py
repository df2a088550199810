"""clex-cache: what is kept is shown, removed and checked, also while others use it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from clex_local import Llama
from clex_local.store.cli import main, short_names
from clex_local.store.documents import store_folder
from helpers.random_gguf import make_model

pytestmark = pytest.mark.chat

COMMAND = [sys.executable, "-m", "clex_local.store.cli"]
A, B = list(range(10, 100)) * 12, [7] * 600  # tokens; whole blocks of 256 are kept


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEX_CACHE", str(tmp_path / "cache"))
    return store_folder()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of one name."""
    where = tmp_path_factory.mktemp("models")
    return [make_model(where / f"{seed}.gguf", original=2048, n_layer=1, seed=seed) for seed in (0, 1)]


def read(model, *texts: list[int]) -> list[int]:
    """Have a model read texts, and say how many tokens of each came from the store."""
    restored = []
    with Llama(model, n_ctx=2048, n_threads=1, verbose=False, store=True) as llm:
        for text in texts:
            next(llm.generate(text, temp=0))
            restored.append(llm.restored_tokens)
            llm.reset()
    return restored


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output
    assert (result.stderr == "") == (code == 0)
    assert "Traceback" not in result.output
    return result.stderr if code else result.stdout


def listed() -> list[dict]:
    return json.loads(run("--json"))["documents"]


def test_where_nothing_is_kept_nothing_is_made(folder):
    assert run() == f"no documents in {folder}\n"
    assert listed() == []
    assert run("check") == "0 files, 0 bytes: all whole\n"
    assert run("clear") == run("clear", "--yes") == "0 documents removed, 0 bytes freed\n"
    assert "documents  0 of 0 models, 0 tokens" in run("stats")
    assert "there is no document abc" in run("rm", "abc", code=1)
    assert not folder.exists()


def test_documents_are_listed_by_model(models):
    read(models[0], A, B)
    read(models[1], B)
    lines = run().splitlines()
    assert len(lines) == 5
    titles = [line for line in lines if not line.startswith(" ")]
    assert [bool(re.fullmatch(r"tiny \([0-9a-f]{8}\)", title)) for title in titles] == [True, True]
    row = r"  [0-9a-f]{8} +(512|1,024) tokens +[\d.]+ [kM]B  \d{4}-\d\d-\d\d \d\d:\d\d  f16"
    assert all(re.fullmatch(row, line) for line in lines if line.startswith(" "))
    found = listed()
    assert sorted(item["tokens"] for item in found) == [512, 512, 1024]
    assert len({item["model_id"] for item in found}) == 2


def test_texts_are_shown_only_when_they_are_asked_for(models):
    read(models[0], [ord(letter) + 3 for letter in "the secret of the sea " * 20])
    assert "secret" not in run() + run("--json") + run("stats") + run("stats", "--json")
    assert "the secret of the sea" in run("--show")
    assert json.loads(run("--show", "--json"))["documents"][0]["begin"].startswith("the secret")
    read(models[0], [ord(letter) + 3 for letter in "the secret of the mountain " * 20])
    assert "    …sea the secret of" in run("--show")  # what tells them apart


def test_removing_keeps_what_another_text_begins_with(models):
    other = A[:600] + [5] * 500
    read(models[0], A, other)
    gone, kept = (item["name"] for item in listed())
    assert run("rm", gone[:10].upper()).endswith("freed\n")
    assert [item["name"] for item in listed()] == [kept]
    assert sorted(read(models[0], A, other)) == [512, 1024]


def test_removing_leaves_no_empty_folders(models, folder):
    read(models[0], A)
    read(models[1], B)
    (folder / "others").mkdir()
    run("rm", "--model", "tiny")
    assert sorted(path.name for path in folder.iterdir()) == ["models", "others"]
    read(models[0], A)
    assert listed()


def test_removing_by_model_and_at_once(models):
    read(models[0], A, B)
    read(models[1], A, B)
    identity = listed()[0]["model_id"]
    result = json.loads(run("rm", "--model", identity[:8], "--json"))
    assert result["removed"] == 2
    assert result["freed"] > 0
    assert {item["model_id"] for item in listed()} != {identity}
    names = [item["name"][:12] for item in listed()]
    assert run("rm", *names, names[0]).startswith("2 documents removed, ")
    read(models[0], A)
    assert run("rm", "--model", "tiny").startswith("1 document removed, ")
    assert listed() == []


def test_what_cannot_be_removed_is_one_line_and_removes_nothing(models):
    read(models[0], A, B)
    name = listed()[0]["name"]
    for arguments, reason in [
        ([name, "f00"], "there is no document f00"),
        ([""], "there is no document ; "),
        (["../x\x1b"], r"no document \.\./x\\x1b"),
        (["--model", "other"], "no documents of a model other"),
        (["--model", ""], "no documents of a model"),
    ]:
        error = run("rm", *arguments, code=1)
        assert re.match(f"clex-cache: error: .*{reason}", error)
        assert error.count("\n") == 1
    for arguments in (["rm"], ["--json", "stats"], ["clear"], ["none"]):
        assert run(*arguments, code=2).count("\n") == 1
    assert len(listed()) == 2


def test_short_names_tell_documents_apart():
    names = ["a" * 64, "a" * 9 + "b" * 55, "c" * 64, "a" * 20 + "c" * 44]
    assert short_names(names) == {names[0]: "a" * 21, names[1]: "a" * 9 + "b", names[2]: "c" * 8,
                                  names[3]: "a" * 20 + "c"}  # fmt: skip
    assert short_names([]) == {}
    assert short_names(["a" * 64]) == {"a" * 64: "a" * 8}


def test_check_removes_what_is_damaged_and_says_so(models, folder):
    read(models[0], A)
    assert re.fullmatch(r"4 files, [\d.]+ kB: all whole\n", run("check"))
    block = sorted(folder.rglob("*.clexblock"))[0]
    data = bytearray(block.read_bytes())
    data[-5] ^= 1
    block.write_bytes(data)
    result = json.loads(run("check", "--json"))
    assert result["damaged"] == 1
    assert result["files"] == 4
    assert not block.exists()
    assert run("check").endswith(": all whole\n")
    (len_before,) = {len(list(folder.rglob("*.clexblock")))}
    read(models[0], A)
    block = sorted(folder.rglob("*.clexblock"))[0]
    block.write_bytes(b"")
    assert " removed 1 damaged and " in run("check")
    assert len_before < 4


def test_stats(models, folder):
    read(models[0], A, B)
    facts = json.loads(run("stats", "--json"))
    files = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert facts | {"limit": 0, "free": 0} == {
        "folder": str(folder),
        "documents": 2,
        "models": 1,
        "tokens": 1536,
        "size": files,
        "limit": 0,
        "free": 0,
    }
    assert facts["limit"] > 0
    assert re.search(r"size +[\d.]+ kB of at most [\d.]+ GB\n", run("stats"))


def test_clear_asks(models):
    pexpect = pytest.importorskip("pexpect")
    read(models[0], A)
    for answer, left in [("n", 1), ("y", 0)]:
        child = pexpect.spawn(COMMAND[0], [*COMMAND[1:], "clear"], encoding="utf-8", timeout=60)
        child.expect(r"Remove 1 document\? \[y/N\]")
        child.sendline(answer)
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == (130 if left else 0)
        assert len(listed()) == left


READ = """
import sys
from clex_local import Llama
with Llama(sys.argv[1], n_ctx=2048, n_threads=1, verbose=False, store=True) as llm:
    for round in range(int(sys.argv[2])):
        for start in range(3):
            text = list(range(10 + start, 100)) * 12
            print([token for _, token in zip(range(3), llm.generate(text, temp=0))], flush=True)
            llm.reset()
"""


def test_others_may_read_meanwhile(models):
    once = subprocess.run([sys.executable, "-c", READ, models[0], "1"], capture_output=True, text=True)
    assert once.returncode == 0
    with subprocess.Popen([sys.executable, "-c", READ, models[0], "10"], stdout=subprocess.PIPE, text=True) as reader:
        while reader.poll() is None:
            for arguments in (["check"], ["--json"], ["stats"], ["clear", "--yes"]):
                run(*arguments)
        assert reader.stdout.read() == once.stdout * 10
    assert reader.returncode == 0
    assert run("check").endswith("all whole\n")
