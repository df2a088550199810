"""The patches as commits of a git tree of llama.cpp, and back.

    python native/patches.py tree build/work      # the pinned source, one commit for each patch
    python native/patches.py export build/work    # native/patches/ from those commits
    python native/patches.py try 0.3.35           # which patches fit that release of llama-cpp-python

Needs git. Patches are in the format of ``git am``; the same commits give the same bytes, whatever git's settings are.
"""

from __future__ import annotations

import argparse
import email
import email.header
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fetch_source import NATIVE, STAMP, download, extract, fetch

PATCHES = NATIVE / "patches"
# Who the commits of a tree are by.
NAME, ADDRESS = "clex-local authors", "authors@clex-local.invalid"
# Of the commit under the patches, whose content is the pinned source's: its id decides those of all others.
BASE_DATE = "2026-01-01T00:00:00+00:00"

# Every setting that could change what format-patch writes.
FORMAT = ["--keep-subject", "--no-numbered", "--zero-commit", "--no-signature", "--stat=72", "--no-thread"]
FORMAT += ["--full-index", "--no-renames", "--no-ext-diff", "--no-textconv", "--unified=3", "--diff-algorithm=myers"]
FORMAT += ["--src-prefix=a/", "--dst-prefix=b/", "--no-indent-heuristic", "--encode-email-headers"]


def git(tree: Path, *arguments: str, date: str | None = None) -> str:
    """Run git in the tree, without anybody's settings; return what it prints, exit with its message if it fails."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "LC_ALL": "C", "TZ": "UTC"}
    if date:
        env |= {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
    done = subprocess.run(["git", *arguments], cwd=tree, env=env, capture_output=True)  # bytes: lines keep their ends
    if done.returncode:
        sys.exit(f"git {arguments[0]} in {tree}: {(done.stderr.strip() or done.stdout.strip()).decode()}")
    return done.stdout.decode()


def commit_source(tree: Path, message: str) -> None:
    """Make a git repository of a source tree, with one commit of all that is in it."""
    git(tree, "init", "--quiet", "--initial-branch=patches")
    for key, value in {"user.name": NAME, "user.email": ADDRESS, "core.autocrlf": "false", "gc.auto": "0"}.items():
        git(tree, "config", key, value)
    (tree / ".git" / "info" / "exclude").write_text(f"{STAMP}\n")
    git(tree, "add", "--all", "--force", "--", ".", f":!{STAMP}")
    git(tree, "commit", "--quiet", "--message", message, date=BASE_DATE)


def make_tree(tree: Path, patches: Sequence[Path]) -> None:
    """Make `tree`, which does not exist yet, a repository of the pinned source with a commit for each patch."""
    if tree.exists():
        sys.exit(f"{tree} exists already: remove it, or go on with it")
    fetch(tree, [])
    commit_source(tree, "The pinned llama.cpp")
    git(tree, "tag", "pinned")
    if patches:
        flags = ["--keep", "--committer-date-is-author-date", "--whitespace=nowarn"]
        git(tree, "am", "--quiet", *flags, *map(str, patches))


def subject(patch: Path) -> str:
    """The subject of a patch in git's format."""
    header = email.message_from_bytes(patch.read_bytes())["Subject"] or ""
    return " ".join(str(email.header.make_header(email.header.decode_header(header))).split())


def name_patches(subjects: Sequence[str], old: dict[str, str]) -> list[str]:
    """File names for commits in their order: of the patch with the same subject, a new one where there is none."""
    names: list[str] = []
    for text in subjects:
        slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
        number = int(names[-1][:4]) + 1 if names else 1
        names.append(old.get(text, f"{number:04}-{slug}.patch"))
    if names != sorted(names) or len({name[:4] for name in names}) < len(names):
        sys.exit(
            f"the numbers of these patches are not in the order of their commits; rename files: {', '.join(names)}"
        )
    return names


def export(tree: Path, patches: Path) -> list[str]:
    """Write the commits of `tree` in place of what the folder `patches` holds; return what changed, a line each."""
    if git(tree, "status", "--porcelain"):
        sys.exit(f"{tree} has changes that are in no commit: commit them, or amend the commit of that purpose")
    commits = git(tree, "rev-list", "--reverse", "pinned..HEAD").split()
    subjects = [git(tree, "show", "--no-patch", "--format=%s", commit).strip() for commit in commits]
    old = {path.name: path.read_bytes() for path in patches.glob("*.patch")}
    names = name_patches(subjects, {subject(patches / name): name for name in old})
    new = {
        name: git(tree, "format-patch", "--stdout", "-1", *FORMAT, commit).rstrip("\n").encode() + b"\n"
        for name, commit in zip(names, commits, strict=True)
    }
    for name in old.keys() - new.keys():
        (patches / name).unlink()
    for name, content in new.items():
        if old.get(name) != content:
            (patches / name).write_bytes(content)
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return [f"{'removed' if name not in new else 'changed' if name in old else 'new    '} {name}" for name in changed]


def try_release(version: str, patches: Sequence[Path]) -> list[str]:
    """Say of each patch whether it fits another release; one that fails is skipped, those after it are tried."""
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        extract(download(Path(scratch), [f"llama-cpp-python=={version}"]), source)
        git(source, "init", "--quiet")  # a repository around the folder would change what git apply does
        for patch in patches:
            done = subprocess.run(["git", "apply", str(patch)], cwd=source, capture_output=True, text=True)
            lines.append(f"{'FAILS' if done.returncode else 'fits '} {patch.name}")
            lines += [f"      {line}" for line in done.stderr.splitlines()]
    return lines


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="The patches as commits of a git tree of llama.cpp, and back.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("tree", help="make a git tree of the pinned source, with the patches as commits")
    command.add_argument("directory", type=Path)
    command = commands.add_parser("export", help="write native/patches/ from the commits of such a tree")
    command.add_argument("directory", type=Path)
    command = commands.add_parser("try", help="say which patches fit another release of llama-cpp-python")
    command.add_argument("version", help="such as 0.3.35")
    args = parser.parse_args()

    patches = sorted(PATCHES.glob("*.patch"))
    if args.command == "tree":
        make_tree(args.directory.resolve(), patches)
        print(f"{len(patches)} patches are commits of {args.directory}")
    elif args.command == "export":
        print("\n".join(export(args.directory.resolve(), PATCHES)) or "nothing changed")
    else:
        lines = try_release(args.version, patches)
        print("\n".join(lines))
        sys.exit(any(line.startswith("FAILS") for line in lines))


if __name__ == "__main__":
    main()
