"""Say which of our patches still fit another release of llama-cpp-python: python native/try_patches.py 0.3.35

Needs git, which finds the place of a hunk whose lines have moved. A patch that fails is skipped, and those after it are
still tried.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from fetch_source import NATIVE, download, extract


def main() -> None:
    """Try every patch, print a line for each, and exit with 1 if one fails."""
    parser = argparse.ArgumentParser(description="Try the patches against another release of llama-cpp-python.")
    parser.add_argument("version", help="such as 0.3.35")
    version = parser.parse_args().version
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        extract(download(Path(scratch), [f"llama-cpp-python=={version}"]), source)
        for patch in sorted(NATIVE.glob("patches/*.patch")):
            done = subprocess.run(["git", "apply", str(patch)], cwd=source, capture_output=True, text=True)
            failed += done.returncode != 0
            print(f"{'FAILS' if done.returncode else 'fits '} {patch.name}")
            for line in done.stderr.splitlines():
                print(f"      {line}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
