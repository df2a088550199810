"""A document store whose files are damaged, foreign, gone, or written by several at once: the answer is the same."""

from __future__ import annotations

import os
import random
import resource

import numpy as np
import pytest

from clex_local.store.documents import DocumentStore, StoreError
from helpers.killed_readers import READER, kill
from helpers.low_level import Context, Model
from helpers.processes import run
from helpers.random_gguf import make_model, random_tokens
from helpers.stored_texts import BLOCK, TEXT_OPTIONS, block_files, read, stored

pytestmark = [pytest.mark.native, pytest.mark.sanitize]

IDS = random_tokens(1100)
OPTIONS = TEXT_OPTIONS
FRONT = 8192  # bytes of a file before its data


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("damage") / "tiny.gguf", original=2048)


@pytest.fixture(scope="module")
def model(path):
    model = Model(path)
    yield model
    model.close()


@pytest.fixture(scope="module")
def expected(model):
    with Context(model, **OPTIONS) as context:
        return read(context, IDS)


@pytest.fixture
def folder(tmp_path, model):
    """A store that has the text."""
    with DocumentStore(tmp_path / "documents") as store, Context(model, **OPTIONS) as context:
        read(context, IDS)
        assert stored(store, context, IDS) == 1024
    return tmp_path / "documents"


def take(folder, model, expected):
    """Restore the text, and read the rest: how many tokens came from the store. The logits are what they should be."""
    with DocumentStore(folder) as store, Context(model, **OPTIONS) as context:
        count = store.restore(context.pointer, IDS)
        assert np.array_equal(read(context, IDS, count), expected)
        return count


def test_every_cut_is_as_if_the_block_were_not_there(folder, model, expected):
    rng = random.Random(0)
    for number in range(4):
        target = block_files(folder)[number]
        whole = target.read_bytes()
        for size in (0, 7, 100, 4000, rng.randrange(len(whole)), len(whole) - 1):
            target.write_bytes(whole[:size])
            target.chmod(0o600)
            assert take(folder, model, expected) == number * BLOCK
            assert not target.exists()
        target.write_bytes(whole + b"\0")
        assert take(folder, model, expected) == number * BLOCK
        target.write_bytes(whole)
        target.chmod(0o600)
    assert take(folder, model, expected) == 1024


@pytest.mark.parametrize("flash_attn", [0, 1])
def test_what_was_read_of_a_damaged_block_is_in_no_product(tmp_path, model, flash_attn):
    """Cells are masked by a weight of zero, which with a value that is no number gives none."""
    options = {**OPTIONS, "flash_attn": flash_attn}
    with DocumentStore(tmp_path / "documents") as store, Context(model, **options) as context:
        expected = read(context, IDS[:600], piece=20)
        assert stored(store, context, IDS[:600]) == 512
    second = block_files(tmp_path / "documents")[1]
    whole = second.read_bytes()
    second.write_bytes(whole[: FRONT + 100] + b"\xff" * (len(whole) - FRONT - 100))
    with DocumentStore(tmp_path / "documents") as store, Context(model, **options) as context:
        assert store.restore(context.pointer, IDS[:600]) == 256
        # Rounded otherwise only by where the batches begin.
        assert np.allclose(read(context, IDS[:600], 256, piece=20), expected, atol=2e-3)


def test_every_flipped_bit_is_noticed(folder, model, expected):
    rng = random.Random(1)
    files = block_files(folder)
    for step in range(40):
        number = rng.randrange(4)
        whole = files[number].read_bytes()
        # every other one in the header, where words have a meaning
        place = rng.randrange(5000 if step % 2 else len(whole))
        files[number].write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        assert take(folder, model, expected) == number * BLOCK
        files[number].write_bytes(whole)
        files[number].chmod(0o600)
    assert take(folder, model, expected) == 1024


def test_swapped_names_are_noticed(folder, model, expected):
    files = block_files(folder)
    first, second = files[1].read_bytes(), files[2].read_bytes()
    files[1].write_bytes(second)
    files[2].write_bytes(first)
    assert take(folder, model, expected) == 256
    assert not files[1].exists()


def test_blocks_of_another_model_are_noticed(folder, model, expected, tmp_path):
    other = Model(make_model(tmp_path / "other.gguf", original=2048, seed=5))
    with DocumentStore(tmp_path / "others") as store, Context(other, **OPTIONS) as context:
        read(context, IDS)
        assert stored(store, context, IDS) == 1024
    other.close()
    for ours, theirs in zip(block_files(folder), block_files(tmp_path / "others"), strict=True):
        ours.write_bytes(theirs.read_bytes())
    assert take(folder, model, expected) == 0


def test_what_others_could_have_written_is_not_taken(folder, model, expected):
    second = block_files(folder)[1]
    second.chmod(0o622)
    assert take(folder, model, expected) == 256


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_files_and_folders_of_another_user_are_not_taken(folder, model, expected):
    second = block_files(folder)[1]
    os.chown(second, 12345, -1)
    assert take(folder, model, expected) == 256
    assert second.exists()
    os.chown(folder, 12345, -1)
    with pytest.raises(StoreError, match="belongs to another user"):
        DocumentStore(folder)


def test_links_and_folders_in_place_of_files(folder, model, expected, tmp_path):
    files = block_files(folder)
    moved = tmp_path / "elsewhere"
    files[2].rename(moved)
    files[2].symlink_to(moved)
    assert take(folder, model, expected) == 512
    assert moved.exists()
    files[0].unlink()
    files[0].mkdir()
    assert take(folder, model, expected) == 0


def test_blocks_that_the_system_does_not_open_stay(folder, model, expected):
    """As where too many files are open."""
    files = block_files(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with DocumentStore(folder) as store, Context(model, **OPTIONS) as context:
        free = os.open(os.devnull, os.O_RDONLY)
        os.close(free)
        try:
            for more in (2, 1, 0):  # files that may be opened besides
                resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, hard))
                context.clear()
                count = store.restore(context.pointer, IDS)
                assert count % BLOCK == 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert np.array_equal(read(context, IDS, count), expected)
    assert block_files(folder) == files
    assert take(folder, model, expected) == 1024


def test_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file: it is no folder"):
        DocumentStore(tmp_path / "file")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(StoreError, match="others may write to it"):
        DocumentStore(shared)


def test_all_is_private(folder):
    for found in folder.rglob("*"):
        assert found.stat().st_mode & 0o777 == (0o700 if found.is_dir() else 0o600)


def test_check_finds_what_is_damaged_and_what_nothing_leads_to(folder):
    files = block_files(folder)
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with DocumentStore(folder) as store:
        check = store.check()
        assert (check.files, check.damaged, check.orphans) == (4, 1, 2)
        assert block_files(folder) == files[:1]
        assert store.check() == type(check)(1, files[0].stat().st_size, 0, 0)


def test_documents_are_listed_and_removed(folder, model):
    other = [*IDS[:600], *random_tokens(500, seed=3)]
    with DocumentStore(folder) as store, Context(model, **OPTIONS) as context:
        read(context, other)
        stored(store, context, other)
        first, second = store.documents()
        assert (first.tokens, second.tokens) == (1024, 1024)
        assert first.size == second.size == 2 * first.own_size
        assert (first.model, first.type_k, first.type_v) == ("tiny", "f16", "f16")
        assert store.remove("no such") is None
        assert store.remove(first.name) == first.own_size
        assert [document.name for document in store.documents()] == [second.name]
        assert store.clear() == second.size
        assert not block_files(folder)


def test_several_writers_at_once(tmp_path, path, model, expected):
    folder = tmp_path / "documents"
    writers = [run(READER, path, folder, seed) for seed in (7, 8, 7)]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    for writer in writers:
        writer.communicate()
    assert len(block_files(folder)) == 3 * 4
    with DocumentStore(folder) as store:
        assert store.check().damaged == 0
    assert take(folder, model, expected) == 1024
    assert not list(folder.rglob("*.clexpart"))


def test_killed_at_any_moment(tmp_path, path):
    """A few times; `python -m helpers.killed_readers 200` in this folder does it more often."""
    assert kill(path, tmp_path / "documents", 6).rounds == 6


def test_what_a_killed_process_of_the_same_number_left(folder, model, expected):
    first = block_files(folder)[0]
    first.unlink()
    for count in range(2000):  # as in a container, where numbers begin anew
        first.with_name(f"{first.name}.{os.getpid()}-{count}.clexpart").touch()
    with DocumentStore(folder) as store, Context(model, **OPTIONS) as context:
        read(context, IDS)
        assert stored(store, context, IDS) == 1024
        assert not store.stats.stopped
    assert take(folder, model, expected) == 1024


FORKED = """
import os, sys
from clex_local.store.documents import DocumentStore
from helpers.low_level import Context, Model
from test_store_damage import IDS, OPTIONS
model = Model(sys.argv[1])
store = DocumentStore(sys.argv[2])
context = Context(model, **OPTIONS)
context.feed(IDS[:300], 0)
assert store.save(context.pointer, IDS[:300]) == 256
child = os.fork()
if child == 0:
    assert store.save(context.pointer, IDS[:300]) == 0
    assert not store.flush()
    store.close()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert store.flush()
context.close()
model.close()
"""


def test_forked_process_ends(tmp_path, path):
    process = run(FORKED, path, tmp_path / "documents")
    assert process.wait(60) == 0
    process.communicate()
    assert len(block_files(tmp_path / "documents")) == 1
