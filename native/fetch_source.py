"""Put the pinned llama.cpp source, with our patches applied, into a directory.

CMake runs this while configuring. pip downloads the source distribution named in llama-cpp-python.txt and checks its
sha256.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

NATIVE = Path(__file__).resolve().parent
PIN = NATIVE / "llama-cpp-python.txt"
# What the libraries, the server and the converter need; the rest of the tree (models, docs) is 3 times as large.
KEEP = {
    *("CMakeLists.txt", "LICENSE", "cmake", "common", "conversion", "ggml", "gguf-py", "include", "licenses"),
    *("scripts", "src", "tools", "vendor"),
}
BINDINGS = Path("bindings")
STAMP = ".clex-fingerprint"  # what a prepared source was made from

PINNED = ("--require-hashes", "--requirement", str(PIN))


def download(directory: Path, wanted: Sequence[str] = PINNED) -> Path:
    """Let pip fetch a source distribution, the pinned one unless told otherwise; return the archive's path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", ":all:", "--dest", str(directory), *wanted]
    # The metadata step configures llama-cpp-python's own CMake project when these leak in.
    env = {k: v for k, v in os.environ.items() if k not in ("CMAKE_ARGS", "SKBUILD_CMAKE_ARGS")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"cannot download the llama.cpp source with pip (is the network reachable?):\n{done.stderr.strip()}")
    return next(directory.glob("*.tar.gz"))


def extract(archive: Path, target: Path) -> None:
    """Unpack vendor/llama.cpp of the archive, reduced to KEEP, into the new directory `target`.

    The Python files of the bindings, which belong to this llama.cpp, come into its folder BINDINGS.
    """
    with tarfile.open(archive) as tar:
        for member in tar:
            place = place_of(Path(member.name).parts[1:])
            if place is None or ".." in place.parts or not (member.isfile() or member.isdir()):
                continue
            member.name = str(place)
            tar.extract(member, target)


def place_of(parts: tuple[str, ...]) -> Path | None:
    """Where a file of the archive is wanted, None if it is not."""
    if parts[:2] == ("vendor", "llama.cpp") and len(parts) > 2 and parts[2] in KEEP:
        return Path(*parts[2:])
    place = Path(*parts)
    if parts == ("LICENSE.md",) or (parts[:1] == ("llama_cpp",) and place.name.endswith((".py", "py.typed"))):
        return BINDINGS / place
    return None


def apply_patch(patch: Path, source: Path) -> None:
    """Apply one patch, in git's format, to the source tree; exit with its name if it does not fit."""
    import patch_ng

    parsed = patch_ng.fromfile(str(patch))
    if not parsed or not parsed.apply(root=str(source)):
        sys.exit(f"{patch.name} does not apply to the pinned llama.cpp source")


def fingerprint(patches: list[Path]) -> str:
    """What decides the content of the prepared source."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in (PIN, *patches):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def fetch(target: Path, patches: list[Path]) -> bool:
    """Make `target` hold the patched source; return False where it already did."""
    stamp = target / STAMP
    wanted = fingerprint(patches)
    if stamp.exists() and stamp.read_text() == wanted:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / "source"
        cached = NATIVE.parent / "build" / "archive" / hashlib.sha256(PIN.read_bytes()).hexdigest()[:16]
        archives = list(cached.glob("*.tar.gz"))
        if not archives:
            archive = download(Path(scratch))
            cached.mkdir(parents=True, exist_ok=True)
            archives = [Path(shutil.move(archive, cached))]
        extract(archives[0], fresh)
        for patch in patches:
            apply_patch(patch, fresh)
        (fresh / STAMP).write_text(wanted)
        replace_changed(fresh, target)
    return True


def replace_changed(fresh: Path, target: Path) -> None:
    """Make `target` equal `fresh`, keeping files whose content is the same, so that a rebuild stays small."""
    if not target.exists():
        fresh.rename(target)
        return
    for old in [p for p in target.rglob("*") if p.is_file()]:
        if not (fresh / old.relative_to(target)).exists():
            old.unlink()
    for new in [p for p in fresh.rglob("*") if p.is_file()]:
        old = target / new.relative_to(fresh)
        if not old.exists() or old.read_bytes() != new.read_bytes():
            old.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(new, old)


def main() -> None:
    """The command that CMake runs."""
    parser = argparse.ArgumentParser(description="Put the pinned llama.cpp source, patched, into a directory.")
    parser.add_argument("target", type=Path)
    parser.add_argument(
        "--only", metavar="PREFIX", nargs="+", help="apply only the patches whose name starts with one PREFIX"
    )
    args = parser.parse_args()
    patches = sorted(NATIVE.glob("patches/*.patch"))
    if args.only:
        patches = [p for p in patches if p.name.startswith(tuple(args.only))]
    changed = fetch(args.target.resolve(), patches)
    print(f"llama.cpp source {'prepared in' if changed else 'is up to date in'} {args.target}")


if __name__ == "__main__":
    main()
