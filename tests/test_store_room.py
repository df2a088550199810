"""The room that a document store has: its limit, a full disk, files that others remove, and clocks that are wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from clex_local.store.documents import DocumentStore
from helpers.low_level import Context, Model
from helpers.processes import run
from helpers.random_gguf import make_model, random_tokens
from helpers.stored_texts import BLOCK, TEXT_OPTIONS, block_files, read, stored

pytestmark = [pytest.mark.native, pytest.mark.sanitize]

IDS = random_tokens(1100)
OPTIONS = TEXT_OPTIONS


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("room") / "tiny.gguf", original=2048)


@pytest.fixture(scope="module")
def model(path):
    with closing(Model(path)) as model:
        yield model


@pytest.fixture(scope="module")
def size(model, tmp_path_factory):
    """Bytes of a block."""
    with DocumentStore(tmp_path_factory.mktemp("size") / "documents") as store, Context(model, **OPTIONS) as context:
        read(context, IDS[:BLOCK])
        stored(store, context, IDS[:BLOCK])
        return store.stats.size


def text(seed: int) -> list[int]:
    return random_tokens(1100, seed=seed)


def fill(store, model, ids):
    with Context(model, **OPTIONS) as context:
        read(context, ids)
        return stored(store, context, ids)


def restored(store, model, ids):
    with Context(model, **OPTIONS) as context:
        return store.restore(context.pointer, ids)


#
# the limit
#


def test_limit_lets_the_oldest_go_from_its_end(tmp_path, model, size):
    with DocumentStore(tmp_path / "documents") as store:
        fill(store, model, text(0))
    with DocumentStore(tmp_path / "documents", limit=size * 10 + 100) as store:
        for seed in (1, 2, 3):
            fill(store, model, text(seed))
        assert sum(file.stat().st_size for file in block_files(store.folder)) <= size * 10 + 100
        assert store.stats.evicted
        assert restored(store, model, text(0)) == 0
        assert restored(store, model, text(3)) == 1024
        assert store.check().orphans == 0


def test_text_beyond_the_limit_is_there_as_far_as_it_fits(tmp_path, model, size):
    """And is not written again and again, each part in place of another."""
    with DocumentStore(tmp_path / "documents", limit=size * 2 + 100) as store:
        with Context(model, **OPTIONS) as context:
            for begin in range(0, 1024, 64):
                context.feed(IDS[begin : begin + 64], begin)
                store.save(context.pointer, IDS[: begin + 64])
                store.flush()
            assert (store.stats.stored, store.stats.evicted) == (512, 0)
            assert not store.stats.stopped
        assert restored(store, model, IDS) == 512
        assert store.check().orphans == 0


def test_texts_that_do_not_fit_beside_each_other(tmp_path, model, size):
    """Two conversations in turn: what was let go for the other is not written again at once."""
    with (
        DocumentStore(tmp_path / "documents", limit=size * 6 + 100) as store,
        Context(model, **OPTIONS) as first,
        Context(model, **OPTIONS) as second,
    ):
        for begin in range(0, 1024, 64):
            for context, ids in ((first, text(1)), (second, text(2))):
                context.feed(ids[begin : begin + 64], begin)
                store.save(context.pointer, ids[: begin + 64])
                store.flush()
        assert store.stats.stored <= 2 * 1024
        assert store.check().orphans == 0
        found = [restored(store, model, ids) for ids in (text(1), text(2))]
        assert sum(found) >= 4 * BLOCK


def test_limit_below_one_block(tmp_path, model):
    with DocumentStore(tmp_path / "documents", limit=1000) as store, Context(model, **OPTIONS) as context:
        read(context, IDS)
        store.save(context.pointer, IDS)
        assert not store.flush()
        assert store.stats.stopped
        assert not block_files(store.folder)


EVICTING = """
import sys
from clex_local.store.documents import DocumentStore
from helpers.low_level import Context, Model
from helpers.random_gguf import random_tokens
from test_store_room import OPTIONS, fill
model = Model(sys.argv[1])
with DocumentStore(sys.argv[2], limit=int(sys.argv[3])) as store:
    for seed in range(100, 160):
        fill(store, model, random_tokens(520, seed=seed))
        print(seed, flush=True)
"""


def test_reader_beside_a_writer_that_lets_files_go(tmp_path, path, model, size):
    folder = tmp_path / "documents"
    with Context(model, **OPTIONS) as context:
        expected = read(context, IDS)
    with run(EVICTING, path, folder, size * 5) as writer, DocumentStore(folder, limit=size * 5) as store:
        assert writer.stdout is not None
        while writer.stdout.readline():
            with Context(model, **OPTIONS) as context:
                count = store.restore(context.pointer, IDS)
                assert np.array_equal(read(context, IDS, count), expected)
                store.save(context.pointer, IDS)
    assert writer.returncode == 0
    assert not store_of(folder).damaged


def store_of(folder: Path):
    with DocumentStore(folder) as store:
        return store.check()


#
# files that others remove
#


@pytest.mark.parametrize("waiting", [False, True])
def test_what_was_removed_under_a_process_is_stored_again(tmp_path, model, waiting):
    with (
        DocumentStore(tmp_path / "documents") as store,
        DocumentStore(tmp_path / "documents") as other,
        Context(model, **OPTIONS) as context,
    ):
        read(context, IDS)
        assert store.save(context.pointer, IDS) == 1024
        if not waiting:
            store.flush()
        other.clear()
        assert stored(store, context, IDS) == 1024
        store.flush()
        other.clear()
        assert stored(store, context, IDS) == 1024
        assert [file.name.split(".")[1] for file in block_files(store.folder)] == ["0", "1", "2", "3"]
    with DocumentStore(tmp_path / "documents") as store:
        assert restored(store, model, IDS) == 1024
        assert store.check().orphans == 0


def test_what_waits_is_not_copied_twice(tmp_path, model):
    with DocumentStore(tmp_path / "documents") as store, Context(model, **OPTIONS) as context:
        read(context, IDS)
        for _ in range(20):
            assert store.save(context.pointer, IDS) == 1024
        store.flush()
        assert store.stats.stored == 1024


def test_one_block_that_was_removed(tmp_path, model):
    with DocumentStore(tmp_path / "documents") as store, Context(model, **OPTIONS) as context:
        read(context, IDS)
        stored(store, context, IDS)
        block_files(store.folder)[1].unlink()
        assert stored(store, context, IDS) == 1024
        assert store.stats.stored == 1024 + BLOCK


#
# the disk
#


FULL = """
import resource, signal, sys
from clex_local.store.documents import DocumentStore
from helpers.low_level import Context, Model
from test_store_room import IDS, OPTIONS
model = Model(sys.argv[1])
store = DocumentStore(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
with Context(model, **OPTIONS) as context:
    for begin in range(0, 1024, 256):
        context.feed(IDS[begin : begin + 256], begin)
        store.save(context.pointer, IDS[: begin + 256])
        store.flush()
assert store.stats.stopped and store.stats.stored == 0
store.close()
"""


def test_full_disk_stops_the_store_and_nothing_else(tmp_path, path):
    process = run(FULL, path, tmp_path / "documents")
    assert process.wait(60) == 0
    process.communicate()
    assert not [found for found in (tmp_path / "documents").rglob("*.clex*")]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, with room for five blocks."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=448k,mode=0700", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(not shutil.which("mount") or os.name == "nt", reason="mounts a file system")
def test_disk_that_is_full(small_disk, model, size):
    with DocumentStore(small_disk / "documents", limit=100 * size) as store, Context(model, **OPTIONS) as context:
        read(context, IDS)
        (small_disk / "others").write_bytes(b"x" * (448 * 1024 - int(2.5 * size) // 4096 * 4096))
        store.save(context.pointer, IDS)
        assert not store.flush()
        assert store.stats.stopped
        assert 0 < len(block_files(store.folder)) < 4
        assert not list(store.folder.rglob("*.clexpart"))
        assert store.save(context.pointer, IDS) < 1024
        expected = read(context, [*IDS, 5], len(IDS))
    with DocumentStore(small_disk / "documents") as store, Context(model, **OPTIONS) as context:
        count = store.restore(context.pointer, [*IDS, 5])
        assert count == len(block_files(store.folder)) * BLOCK
        read(context, IDS, count)
        assert np.array_equal(read(context, [*IDS, 5], len(IDS)), expected)


#
# the clock
#


def test_clock_that_was_set_back(tmp_path, model, size):
    """What was used in a future that did not come goes first, or all that is read now would go before it."""
    with DocumentStore(tmp_path / "documents", limit=size * 10 + 100) as store:
        fill(store, model, text(0))
        tomorrow = time.time() + 86400
        for file in block_files(store.folder):
            os.utime(file, (tomorrow, tomorrow))
    with DocumentStore(tmp_path / "documents", limit=size * 10 + 100) as store:
        for seed in (1, 2, 3):
            fill(store, model, text(seed))
        assert restored(store, model, text(0)) == 0
        assert restored(store, model, text(2)) == 1024
        assert restored(store, model, text(3)) == 1024


#
# another user
#

AS_NOBODY = """
import os, sys
from clex_local.store.documents import DocumentStore, StoreError
from helpers.low_level import Context, Model
from helpers.stored_texts import read, stored
from test_store_room import IDS, OPTIONS
model = Model(sys.argv[1])
with Context(model, **OPTIONS) as context:
    expected = read(context, IDS)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
with DocumentStore(sys.argv[2]) as store, Context(model, **OPTIONS) as context:
    count = store.restore(context.pointer, IDS)
    assert (read(context, IDS, count) == expected).all()
    saved = stored(store, context, IDS)
    print(count, saved, store.stats.stored)
try:
    DocumentStore(sys.argv[3])
except StoreError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root becomes another user")
def test_process_of_another_user(path, model):
    # not below pytest's own folder, which nobody else may enter
    folder = Path(tempfile.mkdtemp(prefix="clex-nobody-"))
    try:
        folder.chmod(0o755)
        theirs, ours = folder / "theirs", folder / "ours"
        with DocumentStore(theirs) as store:
            fill(store, model, IDS)
        shutil.copytree(theirs, ours)
        for found in (theirs, *theirs.rglob("*")):
            os.chown(found, 65534, 65534)
        secret, readable = block_files(theirs)[1:3]
        os.chown(secret, 0, 0)  # cannot be opened
        os.chown(readable, 0, 0)  # can be, and is nobody's own all the same
        readable.chmod(0o644)
        with run(AS_NOBODY, path, theirs, ours) as process:
            said, _ = process.communicate()
        assert process.returncode == 0
        first, second = said.splitlines()
        assert first == "256 1024 0"
        assert second.endswith("ours: it belongs to another user")
        assert secret.exists()
        assert readable.exists()
    finally:
        shutil.rmtree(folder)
