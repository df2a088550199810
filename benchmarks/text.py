"""Fetches the texts of the benchmarks out of Debian packages: Jane Austen's novels, and essays."""

from __future__ import annotations

import gzip
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

NOVELS_PACKAGE = "r-cran-janeaustenr"
NOVELS = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
ESSAYS_PACKAGE = "anarchism"
ESSAYS = "usr/share/doc/anarchism/markdown"
CACHE = Path(__file__).parent.parent / "build" / "text"

_STRING_VECTOR, _STRING = 16, 9  # R's type codes, the low byte of an object's flags


def emma() -> Path:
    """Path of *Emma* as a text file, fetched once: 0.9 MB. No model is trained on it.

    Raises:
        click.ClickException: it is not there and cannot be fetched.
    """
    return _novels()[0]


def training_texts() -> list[Path]:
    """Paths of what small models are trained on: Austen's other novels (2.9 MB) and "An Anarchist FAQ" (11.7 MB).

    Raises:
        click.ClickException: they are not there and cannot be fetched.
    """
    essays = CACHE / "essays.txt"
    if not essays.exists():
        with _package(ESSAYS_PACKAGE) as root:
            texts = [gzip.decompress(path.read_bytes()).decode() for path in sorted((root / ESSAYS).glob("*.gz"))]
        essays.write_text("\n".join(texts), encoding="utf-8")
    return [_novels()[1], essays]


def _novels() -> tuple[Path, Path]:
    """Paths of Emma and of the other five novels."""
    paths = CACHE / "emma.txt", CACHE / "novels.txt"
    if not all(path.exists() for path in paths):
        with _package(NOVELS_PACKAGE) as root:
            novels = r_strings((root / NOVELS).read_bytes())
        for path, wanted in zip(paths, (True, False), strict=True):
            texts = ["\n".join(lines) + "\n" for lines in novels if len(lines) > 1 and (lines[0] == "EMMA") is wanted]
            path.write_text("".join(texts), encoding="utf-8")
    return paths


@contextmanager
def _package(name: str) -> Iterator[Path]:
    """A Debian package, unpacked into a temporary folder.

    Raises:
        click.ClickException: it cannot be fetched.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(
                ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", name], cwd=folder, check=True
            )
            package = next(Path(folder).glob("*.deb"))
            subprocess.run(["dpkg", "-x", package.name, "."], cwd=folder, check=True)
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            raise click.ClickException(
                f"the Debian package {name} cannot be fetched ({error}); pass a text of your own"
            ) from error
        yield Path(folder)


def r_strings(database: bytes) -> list[list[str]]:
    """The character vectors of an R lazy-load database: blocks of a size (big-endian) and a zlib stream."""
    vectors = []
    while database:
        stream = zlib.decompressobj()
        vectors.append(_r_string_vector(stream.decompress(database[4:])))
        database = stream.unused_data
    return vectors


def _r_string_vector(data: bytes) -> list[str]:
    """One serialized character vector: R's binary format, version 3 (a header with the name of the encoding)."""
    magic, version, encoding_length = struct.unpack_from(">2si8xi", data)
    position = 18 + encoding_length
    flags, count = struct.unpack_from(">ii", data, position)
    if magic != b"X\n" or version != 3 or flags & 0xFF != _STRING_VECTOR:
        raise ValueError("not a serialized R character vector")
    position += 8
    strings = []
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", data, position)
        if flags & 0xFF != _STRING or size < 0:
            raise ValueError("not an R string")
        strings.append(data[position + 8 : position + 8 + size].decode())
        position += 8 + size
    return strings


@click.command()
def main() -> None:
    """Fetch the texts and print where they are."""
    for path in (emma(), *training_texts()):
        click.echo(path)


if __name__ == "__main__":
    main()
