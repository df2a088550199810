"""The patches of llama.cpp: to a git tree and back, as native/README.md says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

NATIVE = Path(__file__).parents[1] / "native"
PATCHES = sorted(NATIVE.glob("patches/*.patch"))

pytestmark = [pytest.mark.native, pytest.mark.skipif(shutil.which("git") is None, reason="needs git")]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """native/patches.py, which finds its neighbour as a script does."""
    sys.path.insert(0, str(NATIVE))
    try:
        import patches

        yield patches
    finally:
        sys.path.remove(str(NATIVE))


@pytest.fixture(scope="module")
def tree(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("patches") / "tree"
    script.make_tree(path, PATCHES)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of native/patches/."""
    return Path(shutil.copytree(NATIVE / "patches", tmp_path / "patches"))


def edited(script: ModuleType, tree: Path, tmp_path: Path) -> Path:
    """A copy of the tree, for a test that commits something."""
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "--quiet", str(tree), str(copy)], check=True)
    for key, value in (("user.name", script.NAME), ("user.email", script.ADDRESS)):
        script.git(copy, "config", key, value)
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_exporting_the_commits_gives_the_same_bytes(script: ModuleType, tree: Path, folder: Path) -> None:
    assert script.export(tree, folder) == []
    assert contents(folder) == {path.name: path.read_bytes() for path in PATCHES}


def test_the_build_makes_the_same_source_of_them_as_git(script: ModuleType, tree: Path, tmp_path: Path) -> None:
    """CMake applies them without git."""
    built = tmp_path / "built"
    script.fetch(built, PATCHES)

    def files(root: Path) -> dict[Path, bytes]:
        paths = [p.relative_to(root) for p in root.rglob("*") if p.is_file()]
        return {p: (root / p).read_bytes() for p in paths if p.parts[0] != ".git" and p.name != script.STAMP}

    assert files(built) == files(tree)


def test_an_amended_commit_changes_its_patch_and_a_new_one_gets_the_next_number(
    script: ModuleType, tree: Path, folder: Path, tmp_path: Path
) -> None:
    copy = edited(script, tree, tmp_path)
    (copy / "LICENSE").write_text("amended\n")
    script.git(copy, "commit", "--quiet", "--all", "--amend", "--no-edit")
    (copy / "new.txt").write_text("new\n")
    script.git(copy, "add", "new.txt")
    script.git(copy, "commit", "--quiet", "--message", "Add a file: new.txt")

    last, number = PATCHES[-1].name, int(PATCHES[-1].name[:4]) + 1
    assert script.export(copy, folder) == [f"changed {last}", f"new     {number:04}-add-a-file-new-txt.patch"]
    assert script.export(copy, folder) == []
    assert [script.subject(p) for p in sorted(folder.iterdir())[-2:]] == [
        script.subject(PATCHES[-1]),
        "Add a file: new.txt",
    ]


def test_a_dropped_commit_leaves_the_other_patches_their_names(
    script: ModuleType, tree: Path, folder: Path, tmp_path: Path
) -> None:
    copy = edited(script, tree, tmp_path)
    script.git(copy, "reset", "--quiet", "--hard", "HEAD~1")
    assert script.export(copy, folder) == [f"removed {PATCHES[-1].name}"]
    assert sorted(contents(folder)) == [path.name for path in PATCHES[:-1]]


def test_changes_in_no_commit_are_not_lost_silently(
    script: ModuleType, tree: Path, folder: Path, tmp_path: Path
) -> None:
    copy = edited(script, tree, tmp_path)
    (copy / "LICENSE").write_text("amended\n")
    with pytest.raises(SystemExit, match="changes that are in no commit"):
        script.export(copy, folder)
    assert contents(folder) == {path.name: path.read_bytes() for path in PATCHES}
