"""Files of conversations: their names, what is in them, who has them, and what is refused; no model is needed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest

from clex_local.runtime.sampling import Sampling
from clex_local.session.exchange import AttachedFile, Exchange
from clex_local.session.folder import KeptSession, file_name, listed_sessions, read_session
from clex_local.session.saved_session import SavedSession, SessionError, SessionModel

pytestmark = pytest.mark.chat

ODD = 'A "quoted"\n[\n 1,\n 2\n] [ 1, 2,  3 ] [\u2028 4 ]\t\x1b[31m\u2028 \U0001fae0 <|im_end|> \ufdd0'


def conversation(**changes) -> SavedSession:
    values = dict(
        name="Report",
        model=SessionModel("/models/long.gguf", "Long", "0123"),
        system="Be brief.",
        sampling=Sampling(temp=0.5, top_k=7),
        run={"ctx": 4096, "kv_type": "q8_0", "flash_attn": None, "extend": None},
        turns=[
            Exchange(ODD, "Yes.", [1, 22, 333], "stop", [AttachedFile("/a b.txt", 5, "ab" * 32)]),
            Exchange("And?", "", [], "length"),
        ],
        unanswered=Exchange("Files: [ 1, 2 ]\n\nStill there?", typed_from=17),
        began="2026-01-01T00:00:00",
    )
    return SavedSession(**values | changes)


def test_file_gives_back_what_was_saved_and_can_be_read(tmp_path):
    kept = KeptSession(tmp_path / "sessions", "Report")
    kept.write(conversation())
    assert read_session(kept.path) == conversation(created=kept_created(kept), saved=read_session(kept.path).saved)
    text = kept.path.read_text("utf-8")
    assert '"tokens": [1, 22, 333],\n' in text
    assert "\U0001fae0" in text
    assert "\x1b" not in text
    kept.close()


def kept_created(kept: KeptSession) -> str:
    return json.loads(kept.path.read_text("utf-8"))["created"]


@pytest.mark.skipif(sys.platform == "win32", reason="modes of Unix")
def test_nobody_else_can_read_them(tmp_path):
    before = os.umask(0)
    try:
        kept = KeptSession(tmp_path / "a" / "sessions", "x")
        kept.write(conversation())
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "sessions").stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in kept.path.parent.iterdir()} == {0o600}


def test_names_that_a_file_system_takes_for_one_are_one():
    assert file_name("Report") == file_name("REPORT") == "report"
    assert file_name("Stra\u00dfe") == file_name("STRASSE")
    assert file_name("caf\u00e9") == file_name("cafe\u0301")
    assert file_name("\u0939\u093f\u0928\u094d\u0926\u0940-2.b") == "\u0939\u093f\u0928\u094d\u0926\u0940-2.b"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "-x", "a.", "a/b", "a\\b", "/etc/passwd", "a:b", "a b", "a\n", "a\0", "a*", "~", "con",
     "NUL.txt", "lpt1", "x" * 101, "\u00e9" * 60, "\x1b[2J", "a\u202eb", "a\udce9"],
)  # fmt: skip
def test_names_that_are_none(name, tmp_path):
    with pytest.raises(SessionError) as error:
        KeptSession(tmp_path, name)
    assert str(error.value).isprintable()
    assert not list(tmp_path.iterdir())


GOOD = json.loads(conversation(saved="2026-01-01T00:00:00+00:00").text())


def changed(path: str, value: object) -> str:
    data = json.loads(json.dumps(GOOD))
    *folders, last = path.split(".")
    place = data
    for folder in folders:
        place = place[int(folder)] if isinstance(place, list) else place[folder]
    place[int(last) if isinstance(place, list) else last] = value
    return json.dumps(data)


DAMAGED = {
    "empty": "",
    "text": "Dear diary",
    "list": "[]",
    "foreign": json.dumps({"messages": []}),
    "deep": "[" * 100_000,
    "newer": changed("version", 2),
    "no version": changed("version", "1"),
    "model": changed("model", None),
    "turns": changed("turns", {}),
    "turn": changed("turns.0", "hello"),
    "message": changed("turns.0.message", 5),
    "surrogate": changed("turns.0.message", "\ud800"),
    "tokens": changed("turns.0.tokens", [1, -2]),
    "no integers": changed("turns.0.tokens", [True, 1.5]),
    "huge token": changed("turns.0.tokens", [2**40]),
    "file": changed("turns.0.files", [{"path": 1}]),
    "sampling": changed("sampling.temp", -1),
    "not a number": changed("sampling.top_p", float("nan")),
    "fraction": changed("sampling.top_k", 1.5),
    "penalty": changed("sampling.repeat_penalty", 0),
    "template": changed("chat_template", "{{ x }}"),
    "cache": changed("run.kv_type", "q9"),
    "context": changed("run.ctx", -5),
    "time": changed("began", "yesterday"),
    "left out": changed("left_out", 99),
    "nothing left out": changed("left_out", -1),
    "typed": changed("turns.0.typed_from", 10**6),
    "summary": changed("summary", None),
    "arguments": changed("template_arguments", []),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_damaged_and_foreign_files_are_refused_and_stay(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    for _ in range(2):  # and the lock is given back
        with pytest.raises(SessionError) as error:
            KeptSession(tmp_path, "X")
        assert str(error.value).startswith(f"{path}: ")
        assert str(error.value).isprintable()
    assert path.read_text() == text
    assert [item.name for item in listed_sessions(tmp_path)] == ["x"]


def test_random_damage_is_refused_or_harmless(tmp_path):
    rng, whole = random.Random(0), conversation().text().encode()
    path = tmp_path / "x.json"
    for _ in range(300):
        data = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            session = read_session(path)
        except SessionError:
            continue
        assert SavedSession.parse(session.text(), "x") == session


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder.json").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.json")
    for path in tmp_path.iterdir():
        with pytest.raises(SessionError):
            KeptSession(tmp_path, path.stem)
    (tmp_path / "file").touch()
    with pytest.raises(SessionError, match="sessions cannot be kept there"):
        KeptSession(tmp_path / "file", "x")
    with pytest.raises(SessionError):
        list(listed_sessions(tmp_path / "file"))
    assert not list(listed_sessions(tmp_path / "none"))


HOLD = """
import sys
from pathlib import Path
from clex_local.session.folder import KeptSession
kept = KeptSession(Path(sys.argv[1]), "report")
print("held", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time_has_a_session_and_a_killed_one_has_none(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(SessionError, match=rf"the session REPORT is open in another process \({holder.pid}\)"):
            KeptSession(tmp_path, "REPORT")
        KeptSession(tmp_path, "other").close()
        holder.send_signal(signal.SIGKILL)
    KeptSession(tmp_path, "report").close()


def test_what_another_program_wrote_is_not_overwritten(tmp_path):
    kept = KeptSession(tmp_path, "report")
    assert kept.write(conversation()) is None
    assert kept.write(conversation()) is None
    data = kept.path.read_bytes()
    kept.path.unlink()
    kept.path.write_bytes(data)
    os.utime(kept.path, (0, 0))
    assert kept.write(conversation()) is None  # the same in another file
    kept.path.write_text("something else")
    (tmp_path / "report-2.json").write_text("taken")
    note = kept.write(conversation())
    assert note == f"another program has written {tmp_path}/report.json: this conversation is saved as report-3"
    assert kept.write(conversation()) is None
    assert (tmp_path / "report.json").read_text() == "something else"
    assert (tmp_path / "report-2.json").read_text() == "taken"
    assert read_session(tmp_path / "report-3.json").name == "report-3"
    KeptSession(tmp_path, "report-2x").close()
    with pytest.raises(SessionError, match="open in another"):
        KeptSession(tmp_path, "report-3")


def test_a_file_that_was_deleted_is_written_again(tmp_path):
    kept = KeptSession(tmp_path, "report")
    kept.write(conversation())
    kept.path.unlink()
    assert kept.write(conversation()) is None
    assert kept.path.exists()


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".report.json.0123456789abcdef.tmp").touch()
    (tmp_path / ".other.json.0123456789abcdef.tmp").touch()
    KeptSession(tmp_path, "report").close()
    assert sorted(file.name for file in tmp_path.iterdir()) == [".other.json.0123456789abcdef.tmp"]


def test_a_session_that_cannot_be_written_says_so(tmp_path):
    kept = KeptSession(tmp_path / "sessions", "report")
    shutil.rmtree(tmp_path / "sessions")
    with pytest.raises(SessionError, match=r"report\.json: not saved: "):
        kept.write(conversation())


def test_what_becomes_of_attached_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("hello")
    file = AttachedFile.of(path)
    assert (file.path, file.size, file.change()) == (str(path), 5, None)
    os.utime(path, (0, 0))
    assert file.change() is None
    path.write_text("jello")
    assert file.change() == "has changed"
    path.write_text("hello!")
    assert file.change() == "has changed"
    path.unlink()
    assert file.change() == "is gone"
    path.mkdir()
    assert file.change() == "has changed"
    assert AttachedFile.of(path) is None
    assert AttachedFile.of(tmp_path / "none") is None
    assert AttachedFile("a\0b", 5, "").change() == "is gone"


def test_sessions_are_listed_the_last_one_first(tmp_path):
    for name, saved in [("a", "2026-01-01"), ("b", "2026-01-03"), ("c", "2026-01-02")]:
        (tmp_path / f"{name}.json").write_text(conversation(name=name, saved=saved).text())
    (tmp_path / "d.json").write_text("{}")
    (tmp_path / ".a.json.1.tmp").write_text("{")
    assert [item.name for item in listed_sessions(tmp_path)] == ["b", "c", "a", "d"]
    assert "no session of clex-local" in list(listed_sessions(tmp_path))[-1].fault
