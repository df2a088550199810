"""Fetches the text of the benchmarks: *Emma* by Jane Austen, out of a Debian package."""

from __future__ import annotations

import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

import click

PACKAGE = "r-cran-janeaustenr"
DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
CACHE = Path(__file__).parent.parent / "build" / "text"

_STRING_VECTOR, _STRING = 16, 9  # R's type codes, the low byte of an object's flags


def emma() -> Path:
    """Path of the novel as a text file, fetched once.

    Raises:
        click.ClickException: it is not there and cannot be fetched.
    """
    path = CACHE / "emma.txt"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                subprocess.run(
                    ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", PACKAGE], cwd=folder, check=True
                )
                package = next(Path(folder).glob("*.deb"))
                subprocess.run(["dpkg", "-x", package.name, "."], cwd=folder, check=True)
            except (OSError, subprocess.CalledProcessError, StopIteration) as error:
                raise click.ClickException(
                    f"the Debian package {PACKAGE} cannot be fetched ({error}); pass a text of your own"
                ) from error
            novels = r_strings((Path(folder) / DATA).read_bytes())
        lines = next(novel for novel in novels if novel[0] == "EMMA")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


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
    """Fetch the text and print where it is."""
    click.echo(emma())


if __name__ == "__main__":
    main()
